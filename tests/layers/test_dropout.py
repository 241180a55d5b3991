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
    y = np.asarray(jax.jit(lambda x: L.dropout(x, rate, jax.random.key(0)))(np.ones(n, "float32")))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    assert stats.binomtest(int((y == 0).sum()), n, rate).pvalue > 1e-4


def test_values_and_gradient_share_one_mask(draw):
    """In each dtype; in one program, as all draw the same bits."""
    xs = [draw(50, 4, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")]

    @jax.jit
    def run(*xs):
        found = [jax.vjp(lambda x: L.dropout(x, 0.25, jax.random.key(3)), x) for x in xs]
        return [(y, *pull(jnp.ones_like(y))) for y, pull in found]

    for x, (y, gradient) in zip(xs, jax.device_get(run(*xs)), strict=True):
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y != 0, gradient != 0, err_msg=str(x.dtype))
        kept = y != 0
        assert 0 < kept.sum() < kept.size, x.dtype
        right = np.asarray(x, "float32")[kept] / 0.75
        np.testing.assert_allclose(y.astype("float32")[kept], right, rtol=1e-2, err_msg=str(x.dtype))


def test_does_nothing_outside_training_or_at_rate_zero():
    x = jnp.asarray(np.arange(6, dtype="float32"))
    assert L.Dropout(0.5)({}, x) is x
    y, _ = sw.apply(L.Dropout(0.0), {}, {}, x, train=True)  # needs no key
    np.testing.assert_array_equal(y, x)


def test_each_place_call_and_run_has_its_own_mask():
    def model(v, x):
        return jnp.stack([L.Dropout(0.5)(v.a, x), L.Dropout(0.5)(v.b, x), L.Dropout(0.5)(v.a, x)])

    def run(rng):
        return jax.jit(lambda x: sw.apply(model, {}, {}, x, rng=rng, train=True)[0])(np.ones(64, "float32"))

    first, again, other = (np.asarray(run(rng)) for rng in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    masks = [row.tobytes() for y in (first, other) for row in y]
    assert len(set(masks)) == 6


def test_training_without_a_key_says_what_is_missing():
    with pytest.raises(sw.EffectError, match="pass rng="):
        sw.apply(L.Dropout(0.5), {}, {}, np.ones(3, "float32"), train=True)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, "0.5", float("nan"), True])
def test_refuses_a_bad_rate(rate):
    with pytest.raises(sw.ConfigError, match=r"rate must be a number in \[0, 1\)"):
        L.Dropout(rate)
    if isinstance(rate, float):
        with pytest.raises(sw.ConfigError, match=r"rate must be a number in \[0, 1\)"):
            L.dropout(np.ones(3, "float32"), rate, jax.random.key(0))


def test_refuses_integers():
    with pytest.raises(ValueError, match=r"floating numbers, got int32\[3\]"):
        L.Dropout(0.5)({}, np.arange(3, dtype="int32"))
