"""Checks of a layer's inputs and hyper-parameters. They raise `InputError` and `ConfigError`.

Checks of arrays read ranks, sizes and dtypes, never values, so they cost nothing once a model is compiled. `who` is the
name of the layer or function in the message.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError, InputError
from sapwood.core.layer import describe
from sapwood.core.model_output import is_array


def array(who: str, x: Any) -> jax.Array:
    """Convert `x` to an array. Raises `InputError` for anything but an array, a list or a tuple.

    >>> array("Dense", None)
    Traceback (most recent call last):
    sapwood.core.errors.InputError: Dense expects an array, got None; does what comes before it `return` its result?
    """
    if not is_array(x) and not isinstance(x, list | tuple):
        hint = "; does what comes before it `return` its result?" if x is None else ""
        raise InputError(f"{who} expects an array, got {describe(x)}{hint}")
    return jnp.asarray(x)


def floating(who: str, x: Any) -> jax.Array:
    """Convert `x` to an array. Raises `InputError` if its dtype is not floating.

    >>> floating("dense", jnp.zeros((2, 3), jnp.uint8))
    Traceback (most recent call last):
    sapwood.core.errors.InputError: dense expects floating numbers, got uint8[2,3]; \
convert them first, 8-bit images with x.astype("float32") / 255
    """
    x = array(who, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = ', 8-bit images with x.astype("float32") / 255' if x.dtype == jnp.uint8 else ""
        raise InputError(f"{who} expects floating numbers, got {describe(x)}; convert them first{hint}")
    return x


def integer(who: str, x: Any) -> jax.Array:
    """Convert `x` to an array. Raises `InputError` if its dtype is not an integer dtype.

    Integers below 32 bits become int32, since an 8-bit id cannot be compared with 256.

    >>> integer("embed", jnp.zeros(3, jnp.uint8)).dtype
    dtype('int32')
    """
    x = array(who, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(f"{who} expects integers, got {describe(x)}")
    return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x


def rank(who: str, x: jax.Array, *dimensions: str) -> None:
    """Raise `InputError` unless `x` has exactly these dimensions.

    >>> rank("conv", jnp.zeros((28, 28)), "batch", "height", "width", "channels")
    Traceback (most recent call last):
    sapwood.core.errors.InputError: conv expects (batch, height, width, channels), got float32[28,28] of rank 2; \
add the missing dimensions, for a batch of one x[None], for one channel x[..., None]
    """
    if x.ndim == len(dimensions):
        return
    hint = ""
    if x.ndim < len(dimensions):
        hint = "; add the missing dimensions, for a batch of one x[None], for one channel x[..., None]"
    raise InputError(f"{who} expects ({', '.join(dimensions)}), got {describe(x)} of rank {x.ndim}{hint}")


def at_least(who: str, x: jax.Array, n: int, shape: str) -> None:
    """Raise `InputError` if `x` has fewer than `n` dimensions.

    `shape` is the expected shape as the message shows it, such as "(..., features)".
    """
    if x.ndim < n:
        raise InputError(f"{who} expects {shape}, got {describe(x)} of rank {x.ndim}")


def spatial(n: int) -> tuple[str, ...]:
    """Names of the `n` dimensions between batch and channels, such as ("height", "width")."""
    return {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}.get(n, ("...",) * n)


def positive(layer: Any, *names: str) -> None:
    """Raise `ConfigError` unless these fields of a layer are integers above 0.

    >>> from sapwood import layers as L
    >>> L.Dense(0)
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: Dense: features must be an integer above 0, got 0
    """
    for name in names:
        value = getattr(layer, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{type(layer).__name__}: {name} must be an integer above 0, got {value!r}")


def within(layer: Any, name: str, low: float, high: float) -> None:
    """Raise `ConfigError` unless the field `name` is a number with low <= value < high.

    >>> from sapwood import layers as L
    >>> L.Dropout(1.5)
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: Dropout: rate must be a number in [0, 1), got 1.5
    """
    value = getattr(layer, name)
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not low <= float(value) < high:
        end = "" if math.isinf(high) else f"{high:g}"
        interval = f"in [{low:g}, {end})" if end else f"from {low:g} up"
        meant = migration_hints.meant((value,)) if isinstance(value, int) and name in ("eps", "momentum") else ""
        raise ConfigError(f"{type(layer).__name__}: {name} must be a number {interval}, got {value!r}{meant}")


def axes(layer: Any, n: int, dimensions: str) -> None:
    """Raise `ConfigError` unless the field `axes` is None or a tuple of `n` entries, each a logical name or None.

    `dimensions` names the dimensions in the message.
    """
    value = layer.axes
    named = isinstance(value, tuple) and all(a is None or isinstance(a, str) for a in value)
    if value is not None and (not named or len(value) != n):
        raise ConfigError(
            f"{type(layer).__name__}: axes must be None or a tuple of logical names for {dimensions}, got {value!r}"
        )
