"""`jax.custom_vjp` around a layer: a cursor is a pytree, so it is an argument like any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def plain(v, x):
    return jnp.sin(3 * L.Dense(4)(v.mix, x))


@jax.custom_vjp
def clipped(v, x):
    """`plain`, whose incoming gradient is clipped to [-0.1, 0.1]."""
    return plain(v, x)


def _forward(v, x):
    return plain(v, x), (v, x)


def _backward(saved, gradient):
    return jax.vjp(plain, *saved)[1](jnp.clip(gradient, -0.1, 0.1))


clipped.defvjp(_forward, _backward)


@jax.custom_vjp
def writing(v, x):
    """Wrong: what it puts cannot leave."""
    return L.BatchNorm()(v.norm, x)


writing.defvjp(lambda v, x: (writing(v, x), None), lambda saved, g: (None, g))

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


@functools.cache
def weights():
    return sw.init(lambda v, x: plain(v.block, x), 0, X)[0]


def test_forward_is_the_same_and_backward_is_clipped():
    params = weights()

    def gradient(f, scale, params):
        return jax.grad(lambda p: scale * apply(lambda v: f(v.block, X).sum(), p, {})[0])(params)

    found, expected = jax.jit(lambda p: (apply(lambda v: clipped(v.block, X), p, {})[0], plain(sw.bind(p).block, X)))(
        params
    )
    assert np.array_equal(found, expected)
    small, exact, large, clip = jax.jit(
        lambda p: [gradient(f, scale, p) for f, scale in ((clipped, 0.05), (plain, 0.05), (clipped, 7.0), (plain, 0.1))]
    )(params)
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), a, b))  # noqa: E731
    assert same(small, exact)
    assert same(large, clip)


def test_it_declares():
    assert sw.spec(lambda v: clipped(v.block, X)).params["block"]["mix"]["kernel"].shape == (4, 4)


def test_effects_inside():
    zeros, ones = np.zeros(4, "float32"), np.ones(4, "float32")
    state, params = {"norm": {"mean": zeros, "var": ones}}, {"norm": {"scale": ones, "bias": zeros}}
    with pytest.raises(
        sw.EffectError, match=r"norm: put\(mean=...\) cannot work: .*wrap the inner function in sw.pure"
    ):
        apply(lambda v: writing(v, X), params, state, train=True)


if __name__ == "__main__":
    loss = lambda p, f: 7 * apply(lambda v: f(v.block, X).sum(), p, {})[0]  # noqa: E731
    for f in (plain, clipped):
        print(
            getattr(f, "__name__", f),
            "largest gradient",
            jnp.abs(jax.grad(loss)(weights(), f)["block"]["mix"]["kernel"]).max(),
        )
