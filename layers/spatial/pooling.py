"""Pooling: the maximum or mean of each window, or of all positions. One to three spatial dimensions, channels last.

On a CPU, `max_pool` uses slices instead of `lax.reduce_window`, whose gradient is slow there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sapwood.core.errors import ConfigError, InputError
from sapwood.core.layer import Layer, describe
from sapwood.core.target_platform import platform
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.spatial import windows
from sapwood.layers.spatial.windows import Padding, Sizes


def _geometry(who: str, x: jax.Array, window: tuple[int, ...], strides: Sizes | None, padding: Padding):
    """Check x and the options. Returns x, and window, strides and padding amounts for each spatial dimension."""
    x = check_inputs.floating(who, x)
    window = windows.window(who, "window", window)
    n = len(window)
    check_inputs.rank(who, x, "batch", *check_inputs.spatial(n), "channels")
    strides = window if strides is None else windows.per_dimension(who, "strides", strides, n)
    pads = windows.amounts(windows.padding(who, padding, n), x.shape[1:-1], window, strides, (1,) * n)
    if any(p >= k for pad, k in zip(pads, window, strict=True) for p in pad):
        raise ConfigError(
            f"{who}: padding {pads} must be smaller than the window {window}: each window must see an input"
        )
    windows.must_fit(who, x.shape[1:-1], pads, window, (1,) * n)
    return x, window, strides, pads


def _reduce(x: jax.Array, start, reduce, window, strides, pads) -> jax.Array:
    return lax.reduce_window(x, start, reduce, (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0)))


def max_pool(
    x: jax.Array, window: tuple[int, ...], strides: Sizes | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """The largest value of each window: `(batch, *spatial, channels)` to `(batch, *spatial_out, channels)`.

    Padding is never the largest value. Among equal values the first gets the gradient.

    Args:
        x: `(batch, *spatial, channels)`, floating.
        window: a size for each spatial dimension.
        strides: an integer, or a tuple with one for each spatial dimension. None means the window's sizes.
        padding: "VALID", "SAME", an integer, or a tuple with an integer or a pair (before, after) for each dimension.

    Raises:
        InputError: x has another rank, is not floating, or is smaller than the window.
        ConfigError: another option is invalid.

    >>> max_pool(jnp.array([1.0, 3.0, 2.0, 5.0])[None, :, None], (2,))[0, :, 0]
    Array([3., 5.], dtype=float32)
    """
    x, window, strides, pads = _geometry("max_pool", x, window, strides, padding)

    # XLA's CPU code for the gradient of reduce_window (select_and_scatter) is 4 to 25 times slower than slices. (Under
    # a gradient, lax.platform_dependent would compile both.)
    if platform() == "cpu":
        return _max_by_slices(x, window, strides, pads)
    return _reduce(x, -jnp.inf, lax.max, window, strides, pads)


def _max_by_slices(x: jax.Array, window, strides, pads) -> jax.Array:
    """`max_pool` one dimension at a time, last first: bit for bit the same values and gradients."""
    if any(map(any, pads)):
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))
    for axis in range(x.ndim - 2, 0, -1):
        size, stride = window[axis - 1], strides[axis - 1]
        span = (x.shape[axis] - size) // stride * stride + 1
        views = [lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(size)]
        x = views[0]
        for later in views[1:]:
            x = jnp.where((later > x) | jnp.isnan(later), later, x)  # the first of equals wins, NaN always
    return x


def avg_pool(
    x: jax.Array,
    window: tuple[int, ...],
    strides: Sizes | None = None,
    padding: Padding = "VALID",
    count_padding: bool = False,
) -> jax.Array:
    """The mean of each window: `(batch, *spatial, channels)` to `(batch, *spatial_out, channels)`.

    Args:
        x, window, strides, padding: as in `max_pool`.
        count_padding: True counts padding as zeros, as PyTorch does. False leaves it out of the mean, as Keras does.

    Raises:
        InputError: x has another rank, is not floating, or is smaller than the window.
        ConfigError: another option is invalid.

    >>> avg_pool(jnp.array([1.0, 3.0, 2.0])[None, :, None], (2,), padding="SAME")[0, :, 0]
    Array([2., 2.], dtype=float32)
    """
    x, window, strides, pads = _geometry("avg_pool", x, window, strides, padding)
    total = _reduce(x.astype(np.promote_types(x.dtype, np.float32)), 0.0, lax.add, window, strides, pads)
    if count_padding or not any(map(any, pads)):
        return (total / math.prod(window)).astype(x.dtype)
    seen = jnp.ones((1, *x.shape[1:-1], 1), total.dtype)
    return (total / _reduce(seen, 0.0, lax.add, window, strides, pads)).astype(x.dtype)


def global_max_pool(x: jax.Array) -> jax.Array:
    """The largest value over all positions: `(batch, ..., channels)` to `(batch, channels)`.

    >>> global_max_pool(jnp.array([[[1.0], [3.0]]]))
    Array([[3.]], dtype=float32)
    """
    x = check_inputs.floating("global_max_pool", x)
    check_inputs.at_least("global_max_pool", x, 3, "(batch, ..., channels)")
    return jnp.max(x, tuple(range(1, x.ndim - 1)))


def global_avg_pool(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean over all positions: `(batch, ..., channels)` to `(batch, channels)`.

    `mask` is boolean, with the shape of x without channels; positions where it is false, such as the padding of shorter
    sequences, are left out. An example without any position gives 0. Raises `InputError` for an x or a mask of another
    shape.

    >>> global_avg_pool(jnp.array([[[1.0], [3.0]]]), jnp.array([[True, False]]))
    Array([[1.]], dtype=float32)
    """
    x = check_inputs.floating("global_avg_pool", x)
    check_inputs.at_least("global_avg_pool", x, 3, "(batch, ..., channels)")
    axes = tuple(range(1, x.ndim - 1))
    if mask is None:
        return jnp.mean(x, axes)
    mask = jnp.asarray(mask)
    if mask.dtype != bool or mask.shape != x.shape[:-1]:
        raise InputError(
            f"global_avg_pool expects a boolean mask of the shape of x without channels, got mask "
            f"{describe(mask)} for x {describe(x)}"
        )
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    count = jnp.maximum(jnp.sum(mask, axes), 1)[:, None].astype(wide.dtype)
    return (jnp.sum(wide, axes, where=mask[..., None]) / count).astype(x.dtype)


class MaxPool(Layer):
    """The largest value of each window; see `max_pool`. No parameters.

    >>> MaxPool((2, 2))({}, jnp.ones((1, 4, 4, 3))).shape
    (1, 2, 2, 3)
    """

    window: tuple[int, ...]
    strides: Sizes | None = None
    padding: Padding = "VALID"

    def __post_init__(self) -> None:
        _check_options(self)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        return max_pool(x, self.window, self.strides, self.padding)


class AvgPool(Layer):
    """The mean of each window; see `avg_pool`. No parameters.

    Args:
        window, strides, padding, count_padding: as in `avg_pool`.

    >>> AvgPool((2, 2), strides=1)({}, jnp.ones((1, 4, 4, 3))).shape
    (1, 3, 3, 3)
    """

    window: tuple[int, ...]
    strides: Sizes | None = None
    padding: Padding = "VALID"
    count_padding: bool = False

    def __post_init__(self) -> None:
        _check_options(self)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        return avg_pool(x, self.window, self.strides, self.padding, self.count_padding)


def _check_options(layer: MaxPool | AvgPool) -> None:
    who = type(layer).__name__
    n = len(windows.window(who, "window", layer.window))
    if layer.strides is not None:
        windows.per_dimension(who, "strides", layer.strides, n)
    windows.padding(who, layer.padding, n)


class GlobalMaxPool(Layer):
    """The largest value over all positions; see `global_max_pool`. No parameters.

    >>> GlobalMaxPool()({}, jnp.ones((2, 4, 4, 3))).shape
    (2, 3)
    """

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        return global_max_pool(x)


class GlobalAvgPool(Layer):
    """The mean over all positions, or over those where `mask` is true; see `global_avg_pool`. No parameters.

    >>> GlobalAvgPool()({}, jnp.ones((2, 4, 4, 3))).shape
    (2, 3)
    """

    def __call__(self, v: Vars, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return global_avg_pool(x, mask)
