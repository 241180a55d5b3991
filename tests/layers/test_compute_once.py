"""`compute_once`: the numbers and derivatives of its argument; on a CPU its argument is computed in one place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sapwood import layers as L
from sapwood.layers.compute_once import compute_once


def test_it_is_the_identity_to_every_order():
    x = np.arange(4, dtype="float32")

    @jax.jit
    def orders(x, at):
        square, cube = (lambda x, n=n: compute_once(x) ** n for n in (2, 3))
        return (
            compute_once(x),
            jax.jvp(compute_once, (at,), (3.0,)),
            jax.vmap(jax.grad(square))(x),
            jax.hessian(cube)(at),
        )

    same, moved, slopes, curve = jax.device_get(orders(x, 2.0))
    assert (same == x).all()
    assert moved == (2.0, 3.0)
    assert slopes.tolist() == (2 * x).tolist()
    assert curve == 12.0
    assert jax.jvp(compute_once, (2.0,), (3.0,)) == (2.0, 3.0)  # and without jit
    assert compute_once(x) is x


SHAPE = (2, 4, 4, 4)


def residual(held):
    """The gradient of a small residual convolutional net, its convolutions' inputs held once or not."""
    random = np.random.default_rng(0)
    kernels = random.normal(size=(4, 3, 3, 4, 4)).astype("float32") / 8

    def loss(kernels, x):
        for kernel in kernels:
            x = jax.nn.relu(x + held(kernel, x))
        return jnp.sum(x)

    return jax.jit(jax.grad(loss)), kernels, random.normal(size=SHAPE).astype("float32")


def plain(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it does nothing")
def test_the_gradients_of_kernels_read_the_residual_stream_instead_of_computing_it_again():
    def adds(held):
        step, *arguments = residual(held)
        shape = ",".join(map(str, SHAPE))
        return len(re.findall(rf"= f32\[{shape}\]\S* add\(", step.lower(*arguments).compile().as_text()))

    ours, theirs = adds(lambda kernel, x: L.conv(x, kernel)), adds(plain)
    assert ours < theirs


def test_the_gradients_are_those_without():
    ours, *arguments = residual(lambda kernel, x: L.conv(x, kernel))
    theirs = residual(plain)[0]
    np.testing.assert_allclose(ours(*arguments), theirs(*arguments), rtol=1e-5, atol=1e-6)


def test_a_split_array_stays_split_and_nothing_is_sent():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    x = jax.ShapeDtypeStruct((8, 4, 3), "float32", sharding=sharding)
    compiled = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(compute_once(jnp.cos(x)))))).lower(x).compile()
    assert compiled.output_shardings.is_equivalent_to(sharding, 3)
    sent = re.findall(r" (all-gather|all-to-all|collective-permute)[.\d]*\(", compiled.as_text())
    assert not sent
