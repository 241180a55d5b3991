"""Dropout: what it does to numbers, and that nothing gets the same mask twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import sapwood as sw
from sapwood import layers as L


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drops_at_the_rate_and_keeps_the_mean(rate):
    n = 20_000
    y = np.asarray(L.dropout(jnp.ones(n), rate, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    assert stats.binomtest(int((y == 0).sum()), n, rate).pvalue > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_and_gradient_share_one_mask(dtype, draw):
    x, key = draw(50, 4).astype(dtype), jax.random.key(3)

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: L.dropout(x, 0.25, key), x)
        return y, *pull(jnp.ones_like(y))

    y, gradient = run(x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y != 0, gradient != 0)
    kept = np.asarray(y != 0)
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(np.asarray(y, np.float32)[kept], np.asarray(x, np.float32)[kept] / 0.75, rtol=1e-2)


def test_does_nothing_outside_training_or_at_rate_zero():
    x = jnp.arange(6.0)
    assert L.Dropout(0.5)({}, x) is x
    y, _ = sw.apply(L.Dropout(0.0), {}, {}, x, train=True)  # needs no key
    np.testing.assert_array_equal(y, x)


def test_each_place_call_and_run_has_its_own_mask():
    x = jnp.ones(64)

    def model(v, x):
        return jnp.stack([L.Dropout(0.5)(v.a, x), L.Dropout(0.5)(v.b, x), L.Dropout(0.5)(v.a, x)])

    first, _ = sw.apply(model, {}, {}, x, rng=0, train=True)
    again, _ = sw.apply(model, {}, {}, x, rng=0, train=True)
    other, _ = sw.apply(model, {}, {}, x, rng=1, train=True)
    np.testing.assert_array_equal(first, again)
    masks = [np.asarray(row).tobytes() for y in (first, other) for row in y]
    assert len(set(masks)) == 6


def test_training_without_a_key_says_what_is_missing():
    with pytest.raises(sw.EffectError, match="pass rng="):
        sw.apply(L.Dropout(0.5), {}, {}, jnp.ones(3), train=True)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, "0.5", float("nan"), True])
def test_refuses_a_bad_rate(rate):
    with pytest.raises(sw.ConfigError, match=r"rate must be a number in \[0, 1\)"):
        L.Dropout(rate)
    if isinstance(rate, float):
        with pytest.raises(sw.ConfigError, match=r"rate must be a number in \[0, 1\)"):
            L.dropout(jnp.ones(3), rate, jax.random.key(0))


def test_refuses_integers():
    with pytest.raises(ValueError, match=r"floating numbers, got int32\[3\]"):
        L.Dropout(0.5)({}, jnp.arange(3))
