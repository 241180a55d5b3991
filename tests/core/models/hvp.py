"""Hessian-vector products: forward over reverse through a model with state and dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def loss(v, x):
    x = jnp.tanh(L.BatchNorm()(v.norm, L.Dense(3)(v.hidden, x)))
    return jnp.mean(L.Dropout(0.5)(v.drop, x) ** 3)


X = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")


@functools.cache
def weights():
    return jax.device_get(sw.init(loss, 0, X))


def value(params):
    return apply(loss, params, weights()[1], X, rng=1, train=True)[0]


def hvp(params, tangent):
    return jax.jvp(jax.grad(value), (params,), (tangent,))[1]


def test_against_differences_of_the_gradient():
    params, _ = weights()
    tangent = jax.tree.map(lambda p: np.sin(np.arange(p.size, dtype="float32")).reshape(p.shape), params)
    compiled, eps = jax.jit(jax.grad(value)), np.float32(1e-2)
    gradient = lambda p: jax.device_get(compiled(p))  # noqa: E731
    ahead, behind = (gradient(jax.tree.map(lambda p, t, s=s: p + s * t, params, tangent)) for s in (eps, -eps))
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * eps), ahead, behind)
    found = jax.jit(hvp)(params, tangent)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, expected)


def test_the_key_is_that_of_the_whole_run():
    params, state = weights()

    def wrong(v, x):
        return jax.grad(lambda p: loss(v.replace(params=p), x))(sw.params(v))["hidden"]["kernel"]

    with pytest.raises(sw.EffectError, match=r"norm: put\(mean=...\) cannot work: it belongs to another JAX trace"):
        apply(wrong, params, state, X, rng=1, train=True)


if __name__ == "__main__":
    params, _ = weights()
    ones = jax.tree.map(jnp.ones_like, params)
    print("curvature along ones", jax.tree.map(lambda h: float(jnp.sum(h)), hvp(params, ones)))
