"""Checks of what a model returns: arrays, no generator, no coroutine and no function that was not called."""

import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sapwood.core.errors import ConfigError


def refuse_lazy(f: Callable, y: Any) -> Any:
    """Return ``y``, the result of ``f``. Raises `ConfigError` if ``y`` is lazy, such as a generator.

    >>> def model(v, x):
    ...     yield x
    >>> refuse_lazy(model, model(None, 1))
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: model returned a generator, since it has a `yield`: nothing was computed. \
Write `return`, and for several results a tuple
    """
    if isinstance(y, types.GeneratorType):
        raise ConfigError(
            f"{display_name(f)} returned a generator, since it has a `yield`: nothing was computed. Write "
            "`return`, and for several results a tuple"
        )
    if isinstance(y, types.CoroutineType | types.AsyncGeneratorType):
        if isinstance(y, types.CoroutineType):
            y.close()  # Python would complain that nobody awaited it
        raise ConfigError(f"{display_name(f)} is an `async def`: nothing was computed. Write `def`, and no `await`")
    if isinstance(y, map | filter | zip):
        kind = type(y).__name__
        raise ConfigError(f"{display_name(f)} returned a {kind}: nothing was computed. Write tuple({kind}(...))")
    return y


def arrays(f: Callable, y: Any) -> Any:
    """Return ``y``, the result of ``f``. Raises `ConfigError` if a leaf of it is no array or number.

    >>> arrays(len, {"logits": "many"})
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: len returned a str ('many'); a model returns arrays, or dicts and tuples of them
    """
    for leaf in jax.tree.leaves(refuse_lazy(f, y)):
        if not is_array(leaf):
            kind = type(leaf).__name__
            what = f"{display_name(leaf)} itself, which is to be called" if callable(leaf) else f"a {kind} ({leaf!r})"
            raise ConfigError(f"{display_name(f)} returned {what}; a model returns arrays, or dicts and tuples of them")
    return y


def is_array(x: Any) -> bool:
    """True if JAX accepts ``x`` as an array: a JAX array, a NumPy array, or a number."""
    return has_shape(x) or isinstance(x, bool | int | float | complex | np.generic)


def has_shape(x: Any) -> bool:
    """True if ``x`` has a shape and a dtype: an array, a tracer, or a `jax.ShapeDtypeStruct`."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def display_name(f: Callable) -> str:
    """The name of a model for messages: the name of a function, or the `repr` of a layer."""
    return getattr(f, "__name__", None) or repr(f)
