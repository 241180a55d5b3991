"""A mixture of experts: stacked by vmap, weighed by a router, with a loss that balances them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

EXPERTS = 4

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


@sw.layer
def expert(v, x):
    return L.Dense(x.shape[-1])(v.down, jax.nn.gelu(L.Dense(16)(v.up, x)))


def mixture(v, x):
    weights = jax.nn.softmax(L.Dense(EXPERTS, bias=False)(v.router, x))
    v.loss("balance", EXPERTS * jnp.sum(weights.mean(0) ** 2))
    y = L.Vmap(expert, EXPERTS, in_axes=None)(v.experts, x)  # (experts, batch, features)
    return jnp.einsum("ebf,be->bf", y, weights)


X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


@functools.cache
def weights():
    return jax.device_get(sw.init(mixture, 0, X))


def test_the_stack_equals_the_sum_over_experts():
    params, _ = weights()

    @jax.jit
    def one_by_one(params):
        share = jax.nn.softmax(X @ params["router"]["kernel"])
        each = [expert(p, X) for p in sw.unstack(params["experts"]).values()]
        return sum(w[:, None] * e for w, e in zip(share.T, each, strict=True))

    y, _ = apply(mixture, params, {}, X)
    assert np.allclose(y, one_by_one(params), atol=1e-5)


def test_every_expert_starts_elsewhere_and_as_an_unrolled_one_would():
    params, _ = weights()
    kernel = params["experts"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    alone, _ = sw.init(lambda v, x: [expert(v.experts[i], x) for i in range(EXPERTS)], 0, X)
    assert np.array_equal(alone["experts"]["2"]["up"]["kernel"], kernel[2])


def test_the_balance_reaches_the_objective():
    params, _ = weights()
    _, updates = jax.jit(sw.pure(mixture))(sw.bind(params, train=True), X)
    assert updates.losses["balance"] >= 1 - 1e-6  # one for equal weights, more for unequal ones
    with pytest.raises(sw.EffectError, match=r"auxiliary losses balance would be lost: only sw\.pure"):
        apply(mixture, params, {}, X, train=True)


def test_another_number_of_experts():
    params, _ = weights()
    fewer = {**params, "experts": jax.tree.map(lambda p: p[:3], params["experts"])}
    with pytest.raises(sw.DeclarationError, match=r"params experts/down/bias has shape \(3, 4\); stack\(4\) expects 4"):
        apply(mixture, fewer, {}, X)


if __name__ == "__main__":
    params, _ = sw.init(mixture, 0, X)
    _, updates = sw.pure(mixture)(sw.bind(params, train=True), X)
    print("experts", jax.tree.map(jnp.shape, params["experts"]), "balance", updates.losses["balance"])
