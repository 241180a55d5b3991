"""Initialisers: JAX's numbers, compared by value."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as theirs
from scipy import stats

from sapwood.core import initializers as ours

KEY = jax.random.key(0)
PAIRS = [
    (ours.zeros, theirs.zeros),
    (ours.ones, theirs.ones),
    (ours.constant(0.25), theirs.constant(0.25)),
    (ours.normal(0.5), theirs.normal(0.5)),
    (ours.truncated_normal(0.5), theirs.truncated_normal(0.5)),
    (ours.uniform(0.0, 2.0), theirs.uniform(2.0)),
    (ours.lecun_normal(), theirs.lecun_normal()),
    (ours.lecun_uniform(), theirs.lecun_uniform()),
    (ours.glorot_normal(0, 1), theirs.glorot_normal(0, 1)),
    (ours.glorot_uniform(), theirs.glorot_uniform()),
    (ours.he_normal(in_axis=(0, 1), out_axis=2), theirs.he_normal(in_axis=(0, 1), out_axis=2)),
    (ours.he_uniform(), theirs.he_uniform()),
    (ours.orthogonal(2.0), theirs.orthogonal(2.0)),
]
EVERY = pytest.mark.parametrize(("mine", "jaxs"), PAIRS, ids=[repr(a) for a, _ in PAIRS])


@EVERY
def test_gives_jaxs_numbers(mine, jaxs):
    given, expected = jax.jit(lambda: [init(KEY, (3, 4, 5), jnp.float32) for init in (mine, jaxs)])()
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-7)


@EVERY
def test_is_a_value(mine, jaxs):
    for again in (eval(repr(mine), vars(ours)), pickle.loads(pickle.dumps(mine))):
        assert again == mine
        assert hash(again) == hash(mine)
    assert sum(mine == other for other, _ in PAIRS) == 1


@pytest.mark.parametrize("init", [ours.normal(0.5), ours.he_normal(), ours.orthogonal(), ours.constant(0.3)], ids=repr)
def test_narrow_dtypes_are_rounded_float32(init):
    dtypes = ["bfloat16", "float16", "float8_e4m3fn"]
    wide, *narrow = jax.device_get(jax.jit(lambda: [init(KEY, (8, 8), dtype) for dtype in ("float32", *dtypes)])())
    for dtype, found in zip(dtypes, narrow, strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wide.astype(dtype), dtype)


def test_an_array_is_compared_by_value():
    init = ours.constant(np.arange(3.0))
    assert init == ours.constant(jnp.arange(3.0)) == ours.constant([0, 1, 2])
    assert init != ours.constant([0, 1, 3])
    assert hash(init) == hash(ours.constant((0.0, 1.0, 2.0)))
    np.testing.assert_array_equal(init(KEY, (2, 3), jnp.float32), [[0, 1, 2], [0, 1, 2]])


@pytest.mark.parametrize(
    ("init", "variance"),
    [
        (ours.lecun_normal(), 1 / (2 * 300)),
        (ours.glorot_uniform(), 2 / (2 * 300 + 2 * 500)),
        (ours.he_normal(), 2 / (2 * 300)),
        (ours.lecun_normal(in_axis=(0, 1), out_axis=2), 1 / (2 * 300)),
        (ours.lecun_normal(in_axis=2, out_axis=(0, 1)), 1 / 500),
    ],
)
def test_variance_follows_the_fan(init, variance):
    values = np.asarray(init(KEY, (2, 300, 500), jnp.float32))
    np.testing.assert_allclose(values.var(), variance, rtol=0.02)
    np.testing.assert_allclose(values.mean(), 0, atol=4 * np.sqrt(variance / values.size))


def test_normal_is_normal_in_bfloat16():
    """Drawn in bfloat16 itself, 8 bits of a uniform number would cut the tails."""
    values = np.asarray(ours.normal(1.0)(KEY, (100_000,), "bfloat16"), np.float64)
    assert stats.kstest(values, "norm").statistic < 0.01
    assert np.abs(values).max() > 3.8
