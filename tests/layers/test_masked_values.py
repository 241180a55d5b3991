"""What a mask hides may be inf or NaN: results and gradients are those of the rest, taken by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

NOTHING = [np.inf, -np.inf, np.nan]


def same(found, expected, **tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


def attended(until, **options):
    """The outputs of the first `until` queries, and the gradients of q, k and v by them."""

    def summed(*xs):
        y = L.attention(*xs, **options)
        return jnp.sum(jnp.sin(y[:, :until])), y

    return jax.jit(jax.value_and_grad(summed, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("length", [7, 130])  # as XLA has it; in blocks
def test_a_causal_query_has_nothing_of_later_keys(length, sample):
    at = length - 3
    run = attended(at, causal=True)
    xs = [sample(2, length, n, 4) for n in (4, 2, 2)]
    (_, y), slopes = jax.device_get(run(*xs))
    for which, value in [(1, np.inf), (1, np.nan), (2, -np.inf)]:
        spoilt = [x.copy() for x in xs]
        spoilt[which][1, at, 0] = value
        (_, found), gradients = jax.device_get(run(*spoilt))
        same(found[:, :at], y[:, :at])
        same(gradients, slopes)
        same(found[:, :, 2:], y[:, :, 2:])  # the heads of the other key head
        assert np.isnan(found[1, at:, :2]).all()  # who sees it is told
        same(found[0], y[0])


def test_padding_hidden_from_all_queries_reaches_none(sample):
    mask = np.arange(7).reshape(1, 1, 1, 7) < 5
    run = attended(7, mask=mask)
    xs = [sample(2, 7, n, 4) for n in (4, 2, 2)]
    expected = jax.device_get(run(*xs))
    for i, value in enumerate(NOTHING):
        xs[1 + i % 2][:, 5:] = value
        same(jax.device_get(run(*xs)), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_overflow_are_hidden_too(causal):
    """Finite numbers whose products are not."""
    k = np.ones((1, 128, 1, 4), "float32")
    v = np.arange(128, dtype="float32").reshape(1, 128, 1, 1) * np.ones(4, "float32")
    k[0, 100:] = 3e38
    mask = None if causal else np.tri(128, dtype=bool)[None, None]
    y = jax.jit(lambda k, v: L.attention(jnp.ones_like(k), k, v, mask, causal))(k, v)
    np.testing.assert_allclose(y[0, :100, 0, 0], np.arange(100) / 2, rtol=1e-4)


def test_batch_norm_has_nothing_of_its_padding(sample):
    layer, x, mask = L.BatchNorm(), sample(6, 5, 3), np.arange(30).reshape(6, 5) % 4 > 0
    params = {"scale": sample(3), "bias": sample(3)}
    state = {"mean": sample(3), "var": sample(3) ** 2}

    def summed(params, x, train):
        y, after = sw.apply(layer, params, state, x, mask, train=train)
        return jnp.sum(jnp.sin(y), where=mask[..., None]), (after, jnp.where(mask[..., None], y, 0))

    run = jax.jit(lambda *xs: [jax.value_and_grad(summed, (0, 1), has_aux=True)(*xs, train) for train in (True, False)])
    expected = jax.device_get(run(params, x))
    for value in NOTHING:
        x[~mask] = value
        same(jax.device_get(run(params, x)), expected)


@pytest.mark.parametrize("axis_name", [None, "rows"])
def test_batch_norm_where_nothing_counts_keeps_its_state(axis_name, sample):
    layer, x = L.BatchNorm(axis_name=axis_name), sample(2, 4, 3)
    params = {"scale": sample(3), "bias": sample(3)}
    state = {"mean": sample(3), "var": sample(3) ** 2}

    @jax.jit
    def run(params, x, mask):
        one = lambda x, mask: sw.apply(layer, params, state, x, mask, train=True)  # noqa: E731
        gradient = jax.grad(lambda params: jnp.sum(sw.apply(layer, params, state, x, mask, train=True)[0] ** 2))
        if axis_name is None:
            return one(x, mask), gradient(params)
        return jax.vmap(one, axis_name=axis_name)(x, mask), {}

    (y, after), slopes = run(params, x, np.zeros((2, 4), bool))
    np.testing.assert_allclose(y, L.BatchNorm()(params | state, x), rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape)), after, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    empty, after = jax.jit(lambda x: sw.apply(L.BatchNorm(), params, state, x, train=True))(x[:0])
    assert empty.shape == (0, 4, 3)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_global_avg_pool_has_nothing_of_its_padding(sample):
    x, mask = sample(3, 4, 5, 2), np.arange(60).reshape(3, 4, 5) % 3 > 0
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(L.global_avg_pool(x, mask) ** 2)))
    expected = jax.device_get(run(x))
    for value in NOTHING:
        x[~mask] = value
        same(jax.device_get(run(x)), expected)
