"""Routing against a loop over tokens: choices, weights, the two losses and their gradients, capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.layers import routing


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
def test_it_is_the_formula(k, normalize, draw):
    logits = 2 * draw(2, 7, 5)
    ours = jax.jit(L.top_k_routing, static_argnums=(1, 2))(logits, k, normalize)
    for name, a, b in zip(ours._fields, ours, by_hand(logits, k, normalize), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape) if np.ndim(b) else a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_losses_pull_the_right_way(draw):
    logits = draw(64, 4).at[:, 0].add(1.0)
    losses = jax.jit(lambda x: L.top_k_routing(x, 2)[3:])
    balance, z = jax.jit(jax.jacrev(losses))(logits)
    assert balance.mean(0)[0] > 0 > balance.mean(0)[1:].min()  # the favourite goes down
    eps, i = 1e-2, (3, 1)
    up, down = (losses(logits.at[i].add(d))[1] for d in (eps, -eps))
    np.testing.assert_allclose(z[i], (up - down) / (2 * eps), rtol=2e-2)


def test_balance_has_the_range_it_promises():
    even = jnp.eye(4)[jnp.arange(8) % 4] * 50
    assert abs(L.top_k_routing(even, 1).balance - 1) < 1e-5
    assert abs(L.top_k_routing(jnp.eye(4)[jnp.zeros(8, int)] * 50, 1).balance - 4) < 1e-5


def test_bfloat16_logits_are_routed_in_float32(draw):
    logits = draw(9, 4).astype("bfloat16")
    a, b = (L.top_k_routing(x, 2) for x in (logits, logits.astype("float32")))
    assert {x.dtype for x in a[1:]} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("length", "k", "size"), [(1, 1, 1), (9, 2, 3), (16, 3, 5), (8, 2, 8)])
def test_capacity_takes_first_choices_first(length, k, size, draw):
    chosen = jax.lax.top_k(draw(2, 3, length, 4), k)[1]
    ours, chosen = np.asarray(jax.jit(routing.within_capacity, static_argnums=1)(chosen, size)), np.asarray(chosen)
    for group in np.ndindex(2, 3):
        used = np.zeros(4, int)
        for j in range(k):
            for t in range(length):
                e = chosen[(*group, t, j)]
                assert ours[(*group, t, j)] == (used[e] < size)
                used[e] += 1


def test_of_equals_the_lower_number_comes_first():
    x = jnp.array([[1.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(L.top_k_routing(x, 3).experts, jax.lax.top_k(x, 3)[1])


@pytest.mark.parametrize("k", [0, -1, 5, 1.5, True])
def test_a_k_that_cannot_be(k):
    with pytest.raises(sw.ConfigError, match="k must be an integer from 1 to the 4 experts, got"):
        L.top_k_routing(jnp.ones((2, 4)), k)


def test_logits_that_are_no_numbers_with_a_point():
    with pytest.raises(sw.core.errors.InputError, match=r"top_k_routing expects floating numbers, got int32\[2,4\]"):
        L.top_k_routing(jnp.ones((2, 4), int), 1)
    with pytest.raises(sw.core.errors.InputError, match=r"within_capacity expects experts"):
        routing.within_capacity(jnp.ones(3, int), 1)


def test_capacity_of_a_batch_of_nothing():
    assert routing.within_capacity(jnp.zeros((0, 5, 2), int), 2).shape == (0, 5, 2)
