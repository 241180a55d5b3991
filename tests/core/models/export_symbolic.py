"""`jax.export` with a symbolic batch: one program for every batch size."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


def model(v, x):
    x = L.BatchNorm()(v.norm, L.Dense(8)(v.hidden, x))
    x = L.Scan(L.Dense(8), 2)(v.deep, x)
    return L.Dense(2)(v.out, x) / x.shape[0]


X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


@functools.cache
def weights():
    return jax.device_get(sw.init(model, 0, X))


def exported(f):
    struct = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 4"), jnp.float32)
    return jax.export.export(jax.jit(f))(struct)


def test_one_program_for_every_batch():
    params, state = weights()
    program = exported(lambda x: sw.apply(model, params, state, x)[0])
    assert str(program.out_avals[0].shape) == "(batch, 2)"
    for batch in (1, 6):
        here, _ = jax.jit(sw.apply, static_argnums=0)(model, params, state, X[:batch])
        assert np.allclose(jax.jit(program.call)(X[:batch]), here, atol=1e-5)


def test_spec_of_a_symbolic_batch():
    struct = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4"), jnp.float32)
    assert sw.spec(model, struct).params["hidden"]["kernel"].shape == (4, 8)


def test_a_parameter_shaped_by_the_batch():
    def wrong(v, x):
        return x * v.gate.param("scale", x.shape, jax.nn.initializers.ones)

    message = r"gate/scale: a variable's shape must be plain integers, got \('batch', '4'\); a symbolic or traced size"
    with pytest.raises(sw.DeclarationError, match=message):
        exported(lambda x: sw.apply(wrong, {"gate": {"scale": np.ones((6, 4), "float32")}}, {}, x)[0])


if __name__ == "__main__":
    program = exported(lambda x: sw.apply(model, *weights(), x)[0])
    print(program.in_avals, "->", program.out_avals)
