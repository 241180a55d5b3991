"""When two initialisers are one: what they are made of is equal, even where Python compares them by object."""

import functools
import types
from typing import Any

import jax
import numpy as np

from sapwood.core.fingerprint import globals_of
from sapwood.core.traces import is_traced

_PARTS = (types.FunctionType, types.MethodType, functools.partial, tuple, list, dict)
_EMPTY = types.CellType()


def identity(x: Any, around: tuple = ()) -> Any:
    """What makes two initialisers the same, as something that compares and hashes.

    A function is its code, its defaults, what it closes over and the globals that it names, a method its object too, a
    `functools.partial` its function and arguments; a number is its type and its digits, so that 1 and 1.0, or 0.0 and
    -0.0, are two; anything else is its value. So two calls of ``jax.nn.initializers.lecun_normal()``, which
    give two closures, count as one. Arrays count by their numbers; traced ones, whose numbers nobody knows, are alike.

    >>> def given(a):
    ...     return lambda key, shape, dtype: np.asarray(a, dtype)
    >>> identity(given(np.ones(2))) == identity(given(np.ones(2))), identity(given(np.ones(2))) == identity(given([1]))
    (True, False)
    """
    if not isinstance(x, _PARTS):
        return _value(x, around)
    for depth, outer in enumerate(around):
        if outer is x:  # a function may hold itself
            return "around", depth
    around = (*around, x)
    if isinstance(x, types.FunctionType):
        held = [identity(cell.cell_contents, around) for cell in x.__closure__ or () if cell != _EMPTY]
        named = [(name, identity(value, around)) for name, value in globals_of(x)]
        return x.__code__, identity(x.__defaults__, around), identity(x.__kwdefaults__, around), *held, *named
    if isinstance(x, types.MethodType):
        owner = x.__self__  # one without a value of its own may be made anew in each trace
        plain = type(owner).__eq__ is object.__eq__ and not isinstance(owner, type) and hasattr(owner, "__dict__")
        return identity(x.__func__, around), type(owner), identity(vars(owner) if plain else owner, around)
    if isinstance(x, functools.partial):
        return functools.partial, *(identity(part, around) for part in (x.func, x.args, x.keywords))
    if isinstance(x, list | dict):
        return _Held(x, around)
    return type(x), *(identity(part, around) for part in x)


def _value(x: Any, around: tuple) -> Any:
    """x itself where it has a hash, else what compares as it does."""
    if isinstance(x, bool | int | float | complex | np.number | np.bool_):
        return type(x), repr(x)
    try:
        hash(x)
    except TypeError:
        if is_traced(x):
            return type(x)
        if isinstance(x, np.ndarray | jax.Array) or not hasattr(x, "__dict__"):
            return _Held(x)
        return type(x), identity(vars(x), around)
    return x


class _Held:
    """What has no hash. It is looked into only where another one of its type is met, so that one long list which is met
    again and again costs nothing."""

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
            return tuple(identity(part, self.around) for part in self.x)
        return frozenset((name, identity(value, self.around)) for name, value in self.x.items())

    @functools.cached_property
    def _numbers(self) -> Any:
        try:
            return np.asarray(self.x).tobytes()
        except (RuntimeError, TypeError):  # partly on other machines, or a random key
            return id(self.x)
