"""`initializer_key`: a key that is equal for initializers that do the same, even if Python compares them by object.

`Recorder` uses it to compare declarations, and `init` to group variables that one program can draw.
"""

import functools
import types
from typing import Any

import jax
import numpy as np

from sapwood.core.fingerprint import globals_of
from sapwood.core.traces import is_traced

_PARTS = (types.FunctionType, types.MethodType, functools.partial, tuple, list, dict)
_EMPTY = types.CellType()


def initializer_key(x: Any, around: tuple = ()) -> Any:
    """A hashable key for an initializer. Two initializers are the same if their keys are equal.

    So two calls of ``jax.nn.initializers.lecun_normal()``, which return two closures, have equal keys. The key consists
    of, recursively:

    - for a function, its code, defaults, closure and the globals that it names; for a method, also its object;
    - for a `functools.partial`, its function and arguments;
    - for a number, its type and digits: 1 and 1.0 differ, and so do 0.0 and -0.0;
    - for an array, its numbers; tracers, whose numbers are unknown, are equal if they have the same type;
    - for anything else, its value.

    ``around`` holds the objects that contain ``x``, to stop at cycles.

    >>> def given(a):
    ...     return lambda key, shape, dtype: np.asarray(a, dtype)
    >>> one, same, other = (initializer_key(given(x)) for x in (np.ones(2), np.ones(2), [1]))
    >>> one == same, one == other
    (True, False)
    """
    if not isinstance(x, _PARTS):
        return _value(x, around)
    for depth, outer in enumerate(around):
        if outer is x:  # a cycle: a function may hold itself
            return "around", depth
    around = (*around, x)
    if isinstance(x, types.FunctionType):
        held = [initializer_key(cell.cell_contents, around) for cell in x.__closure__ or () if cell != _EMPTY]
        named = [(name, initializer_key(value, around)) for name, value in globals_of(x)]
        return (
            x.__code__,
            initializer_key(x.__defaults__, around),
            initializer_key(x.__kwdefaults__, around),
            *held,
            *named,
        )
    if isinstance(x, types.MethodType):
        owner = x.__self__  # without equality of its own it is compared by attributes: each trace may make a new one
        plain = type(owner).__eq__ is object.__eq__ and not isinstance(owner, type) and hasattr(owner, "__dict__")
        return (
            initializer_key(x.__func__, around),
            type(owner),
            initializer_key(vars(owner) if plain else owner, around),
        )
    if isinstance(x, functools.partial):
        return functools.partial, *(initializer_key(part, around) for part in (x.func, x.args, x.keywords))
    if isinstance(x, list | dict):
        return _Held(x, around)
    return type(x), *(initializer_key(part, around) for part in x)


def _value(x: Any, around: tuple) -> Any:
    """``x`` itself if it is hashable, else a hashable key that compares as ``x`` does."""
    if isinstance(x, bool | int | float | complex | np.number | np.bool_):
        return type(x), repr(x)
    try:
        hash(x)
    except TypeError:
        if is_traced(x):
            return type(x)
        if isinstance(x, np.ndarray | jax.Array) or not hasattr(x, "__dict__"):
            return _Held(x)
        return type(x), initializer_key(vars(x), around)
    return x


class _Held:
    """Wraps an unhashable value. It hashes by type and compares contents only on collision with another object, so
    hashing a long list is O(1)."""

    def __init__(self, x: Any, around: tuple = ()):
        self.x, self.around = x, around

    def __hash__(self) -> int:
        return hash(type(self.x))

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Held) or type(self.x) is not type(other.x):
            return False
        if self.x is other.x:
            return True
        if isinstance(self.x, list | dict):
            return self._inside == other._inside
        if not isinstance(self.x, np.ndarray | jax.Array):
            return bool(self.x == other.x)
        alike = (self.x.shape, self.x.dtype) == (other.x.shape, other.x.dtype)
        return alike and self._numbers == other._numbers

    @functools.cached_property
    def _inside(self) -> Any:
        if isinstance(self.x, list):
            return tuple(initializer_key(part, self.around) for part in self.x)
        return frozenset((name, initializer_key(value, self.around)) for name, value in self.x.items())

    @functools.cached_property
    def _numbers(self) -> Any:
        try:
            return np.asarray(self.x).tobytes()
        except (RuntimeError, TypeError):  # an array that is partly on other processes' devices, or a random key
            return id(self.x)
