"""Routing against a loop over tokens: choices, weights, the two losses and their gradients, capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.experts import routing


def by_hand(logits, k, normalize):
    logits = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    n, experts = logits.shape
    chosen, weights = np.zeros((n, k), int), np.zeros((n, k))
    counts, mean, z = np.zeros(experts), np.zeros(experts), 0.0
    for t, row in enumerate(logits):
        p = np.exp(row - row.max())
        z += (np.log(p.sum()) + row.max()) ** 2 / n
        p /= p.sum()
        chosen[t] = np.argsort(-p, kind="stable")[:k]
        weights[t] = p[chosen[t]] / (p[chosen[t]].sum() if normalize else 1)
        counts[chosen[t]] += 1
        mean += p / n
    load = counts / (n * k)
    return chosen, weights, load, experts * load @ mean, z


@pytest.mark.parametrize(("k", "normalize"), [(1, False), (2, True), (3, False), (5, True)])
def test_it_is_the_formula(k, normalize, sample):
    logits = 2 * sample(2, 7, 5)
    ours = jax.device_get(jax.jit(L.top_k_routing, static_argnums=(1, 2))(logits, k, normalize))
    for name, a, b in zip(ours._fields, ours, by_hand(logits, k, normalize), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape) if np.ndim(b) else a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_losses_pull_the_right_way(sample):
    logits = sample(64, 4) + np.array([1, 0, 0, 0], "float32")
    eps, i = np.float32(1e-2), (3, 1)
    step = np.zeros_like(logits)
    step[i] = eps

    @jax.jit
    def run(x, *others):
        losses = lambda x: L.top_k_routing(x, 2)[3:]  # noqa: E731
        return jax.jacrev(losses)(x), [losses(x)[1] for x in others]

    (balance, z), (up, down) = jax.device_get(run(logits, logits + step, logits - step))
    assert balance.mean(0)[0] > 0 > balance.mean(0)[1:].min()  # the favourite goes down
    np.testing.assert_allclose(z[i], (up - down) / (2 * eps), rtol=2e-2)


def test_balance_has_the_range_it_promises():
    even, uneven = (np.eye(4, dtype="float32")[i] * 50 for i in (np.arange(8) % 4, np.zeros(8, int)))
    balance = jax.jit(lambda x: L.top_k_routing(x, 1).balance)
    assert abs(float(balance(even)) - 1) < 1e-5
    assert abs(float(balance(uneven)) - 4) < 1e-5


def test_bfloat16_logits_are_routed_in_float32(sample):
    logits = sample(9, 4, dtype="bfloat16")
    a, b = jax.jit(lambda *xs: [L.top_k_routing(x, 2) for x in xs])(logits, logits.astype("float32"))
    assert {x.dtype for x in a[1:]} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("length", "k", "size"), [(1, 1, 1), (9, 2, 3), (16, 3, 5), (8, 2, 8)])
def test_capacity_takes_first_choices_first(length, k, size, sample):
    chosen = np.argsort(sample(2, 3, length, 4), -1)[..., :k].astype("int32")
    ours = np.asarray(jax.jit(routing.within_capacity, static_argnums=1)(chosen, size))
    for group in np.ndindex(2, 3):
        used = np.zeros(4, int)
        for j in range(k):
            for t in range(length):
                e = chosen[(*group, t, j)]
                assert ours[(*group, t, j)] == (used[e] < size)
                used[e] += 1


def test_of_equals_the_lower_number_comes_first():
    x = np.array([[1, 3, 3, 1], [0, 0, 0, 0]], "float32")
    ours, theirs = jax.jit(lambda x: (L.top_k_routing(x, 3).experts, jax.lax.top_k(x, 3)[1]))(x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, [[1, 2, 0], [0, 1, 2]])


@pytest.mark.parametrize("k", [0, -1, 5, 1.5, True])
def test_a_k_that_cannot_be(k):
    with pytest.raises(sw.ConfigError, match="k must be an integer from 1 to the 4 experts, got"):
        L.top_k_routing(np.ones((2, 4), "float32"), k)


def test_logits_that_are_no_numbers_with_a_point():
    with pytest.raises(sw.core.errors.InputError, match=r"top_k_routing expects floating numbers, got int32\[2,4\]"):
        L.top_k_routing(np.ones((2, 4), "int32"), 1)
    with pytest.raises(sw.core.errors.InputError, match=r"within_capacity expects experts"):
        routing.within_capacity(np.ones(3, "int32"), 1)


def test_capacity_of_a_batch_of_nothing():
    run = jax.jit(routing.within_capacity, static_argnums=1)
    assert run(np.zeros((0, 5, 2), "int32"), 2).shape == (0, 5, 2)
