"""Pooling against Keras, NumPy, and the plain form of its own fast path."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sapwood as sw
from sapwood import layers as L

CASES = [
    # (x, window, strides, padding, amounts)
    ((2, 7, 3), (2,), None, "VALID", ((0, 0),)),
    ((2, 7, 3), (3,), 2, "SAME", ((1, 1),)),
    ((2, 6, 5, 3), (2, 2), None, "VALID", ((0, 0), (0, 0))),
    ((1, 6, 5, 2), (3, 2), (1, 2), "SAME", ((1, 1), (0, 1))),
    ((1, 5, 5, 2), (3, 3), 2, 1, ((1, 1), (1, 1))),
    ((1, 5, 5, 2), (2, 3), (3, 1), ((1, 0), 2), ((1, 0), (2, 2))),
    ((1, 4, 4, 5, 2), (2, 1, 3), 2, "SAME", ((0, 0), (0, 0), (1, 1))),
]


def windows(x, window, strides, amounts, fill):
    """Every window of the padded x: `(batch, *out, channels, elements)`."""
    strides = window if strides is None else strides if isinstance(strides, tuple) else (strides,) * len(window)
    x = np.pad(np.asarray(x), ((0, 0), *amounts, (0, 0)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, window, tuple(range(1, x.ndim - 1)))
    view = view[(slice(None), *(slice(None, None, s) for s in strides))]
    return view.reshape(*view.shape[: x.ndim], -1)


@pytest.mark.parametrize(("shape", "window", "strides", "padding", "amounts"), CASES)
def test_matches_numpy(shape, window, strides, padding, amounts, sample):
    x = sample(*shape)
    seen = windows(x, window, strides, amounts, np.nan)
    layers = [pool(window, strides, padding) for pool in (L.MaxPool, L.AvgPool)]
    layers.append(L.AvgPool(window, strides, padding, count_padding=True))
    largest, mean, counted = jax.jit(lambda x: [layer({}, x) for layer in layers])(x)
    np.testing.assert_array_equal(largest, np.nanmax(seen, -1))
    np.testing.assert_allclose(mean, np.nanmean(seen, -1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(counted, np.nan_to_num(seen).mean(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["MaxPooling2D", "AveragePooling2D"])
@pytest.mark.parametrize(("window", "strides", "padding"), [((2, 2), None, "valid"), ((3, 2), 2, "same")])
def test_matches_keras_and_its_gradient(name, window, strides, padding, keras, agree, sample):
    oracle = getattr(keras.layers, name)(window, strides, padding)
    ours = (L.MaxPool if name.startswith("Max") else L.AvgPool)(window, strides, padding)
    agree(lambda x: ours({}, x), oracle, sample(2, 7, 6, 3))


@pytest.mark.fresh_compile  # the bits of the programs that users run
@pytest.mark.parametrize(("shape", "window", "strides", "padding", "amounts"), CASES[1:6:2])
def test_max_pool_is_bit_equal_to_reduce_window(shape, window, strides, padding, amounts, sample):
    x = np.round(2 * sample(*shape))  # many equal values: the gradient goes to the first
    steps = strides if isinstance(strides, tuple) else (strides,) * len(window)

    def plain(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *steps, 1), ((0, 0), *amounts, (0, 0)))

    def run(f, x):
        y, pull = jax.vjp(f, x)
        return y, *pull(jnp.arange(float(y.size)).reshape(y.shape))

    ours, theirs = jax.jit(lambda x: [run(f, x) for f in (lambda x: L.max_pool(x, window, strides, padding), plain)])(x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_max_pool_lowers_to_reduce_window_elsewhere(monkeypatch):
    """The slices are for CPU alone: other platforms have fast code for the plain form."""
    from sapwood.layers.spatial import pooling

    def lowered(platform):
        monkeypatch.setattr(pooling, "platform", lambda: platform)
        traced = jax.jit(jax.grad(lambda x: L.max_pool(x, (2, 2)).sum())).trace(np.ones((1, 4, 4, 1), "float32"))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "select_and_scatter" in lowered("cuda")
    assert "select_and_scatter" not in lowered("cpu")


def test_max_pool_passes_nan_on():
    run = jax.jit(lambda x: L.max_pool(x, (2, 2)))
    for place in itertools.product(range(2), range(2)):
        x = np.zeros((1, 4, 4, 1), "float32")
        x[0, place[0], place[1], 0] = np.nan
        np.testing.assert_array_equal(np.isnan(run(x)).ravel(), [True, False, False, False])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_keeps_its_dtype_and_averages_in_float32(dtype):
    x = np.full((1, 64, 64, 1), 100, jnp.dtype(dtype))  # the sum of a window overflows float16
    assert jax.eval_shape(lambda x: L.max_pool(x, (2, 2)), x).dtype == dtype
    mask = np.ones((1, 64, 64), bool)
    run = jax.jit(lambda x: [L.avg_pool(x, (64, 64)), L.global_avg_pool(x), L.global_avg_pool(x, mask)])
    for y in jax.device_get(run(x)):
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.ravel(), 100)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 4, 5, 3), (2, 2, 3, 2, 3)])
def test_global_pools_match_numpy(shape, sample):
    x = sample(*shape)
    axes = tuple(range(1, len(shape) - 1))
    largest, mean = jax.jit(lambda x: [layer({}, x) for layer in (L.GlobalMaxPool(), L.GlobalAvgPool())])(x)
    np.testing.assert_array_equal(largest, x.max(axes))
    np.testing.assert_allclose(mean, x.mean(axes), rtol=1e-5, atol=1e-6)


def test_global_avg_pool_with_a_mask(agree, sample):
    mask = np.array([[True, True, False], [False, True, False]])
    agree(
        lambda x: L.GlobalAvgPool()({}, x, mask),
        lambda x: jnp.stack([x[0, :2].mean(0), x[1, 1]]),
        sample(2, 3, 4),
    )
    nothing = jax.jit(L.global_avg_pool)(np.ones((1, 3, 2), "float32"), np.zeros((1, 3), bool))
    np.testing.assert_array_equal(nothing, [[0, 0]])


@pytest.mark.parametrize("layer", [L.MaxPool, L.AvgPool])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2}, r"window must be a tuple with a size for each spatial dimension"),
        ({"window": (2, 0)}, r"window must be an integer above 0"),
        ({"strides": 0}, r"strides must be an integer above 0"),
        ({"padding": "CAUSAL"}, r"padding must be 'SAME', 'VALID', an integer"),
        ({"padding": (1,)}, r"a tuple of 2"),
    ],
)
def test_refuses_bad_options(layer, options, message):
    with pytest.raises(sw.ConfigError, match=message):
        layer(**{"window": (2, 2), **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: L.max_pool(x[0], (2, 2)), r"max_pool expects \(batch, height, width, channels\)"),
        (lambda x: L.avg_pool(x, (9, 2)), r"a window of \(9, 2\) does not fit into \(4, 4\)"),
        (lambda x: L.max_pool(x, (2, 2), padding=2), r"each window must see an input"),
        (lambda x: L.max_pool(x.astype("int32"), (2, 2)), r"floating numbers, got int32"),
        (lambda x: L.global_max_pool(x[0, 0]), r"\(batch, \.\.\., channels\)"),
        (lambda x: L.global_avg_pool(x, np.ones(1, bool)), r"mask bool\[1\] for x float32\[1,4,4,2\]"),
    ],
)
def test_explains_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, jax.ShapeDtypeStruct((1, 4, 4, 2), "float32"))
