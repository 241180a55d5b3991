"""`fingerprint`: everything that functions are made of, as a tuple, to detect edits between two calls.

A trainer compares fingerprints to decide whether its compiled programs are stale. `_parts` takes an object apart, by
kind. Code of installed packages is assumed not to change, which keeps a fingerprint small. Globals are found by reading
bytecode (`_globals`); `write_only` recognizes containers that code only fills.
"""

import contextlib
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import sys
import sysconfig
import types
import weakref
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np

from sapwood.core.write_only import ITEM, METHODS, fills_how

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_STANDARD = sysconfig.get_paths()["stdlib"]
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_CELLS = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter, bytearray, np.ndarray)
_WHOLE = 2**22  # bytes up to which all numbers of an array are compared
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_ABOUT = ("__doc__", "__module__", "__name__", "__qualname__", "__annotations__")
_WRAPPERS = (type(jax.jit(len)), type(functools.cache(len)))
_ANEW = jax.make_user_context(None)


def fingerprint(*roots: Any) -> tuple:
    """What values and functions are made of now, as a tuple that can be compared.

    Two fingerprints differ if a helper was edited, a global was set or a module was reloaded in between. They consist
    of, recursively:

    - for a function, its code, its defaults, its closure and each global that its code names; ``helpers.block`` is
      looked up in the module;
    - for a class, its methods; for another object, its class and attributes;
    - for a NumPy array, its numbers; for a JAX array, which never changes, its identity;
    - for a module that code uses other than by attribute, everything defined in it.

    Code of installed packages is assumed not to change. Input from elsewhere, such as a file or an environment
    variable, is not included.

    Two things are compared incompletely. A NumPy array of more than 4 MiB is compared by identity and by a sample of
    65 536 of its numbers: a new array in its place is detected, but a write into a part of it may not be. A container
    that code only fills, as ``log.append(x)`` does in a callback, is compared by identity, without its contents.

    >>> scale = 2.0
    >>> def helper(x):
    ...     return x * scale
    >>> def model(x):
    ...     return helper(x)
    >>> before = fingerprint(model)
    >>> before == fingerprint(model)
    True
    >>> scale = 3.0
    >>> before == fingerprint(model)
    False
    """
    found: list[Any] = []
    seen: dict[int, tuple[int, Any]] = {}  # id -> (number, object); holding the object keeps its id from being reused
    waiting: list[Any] = [*reversed(roots)]
    while waiting:
        x = waiting.pop()
        if isinstance(x, _Told):
            found.append(x.what)
        elif isinstance(x, _PLAIN):
            found.append(_plain(x))
        elif id(x) in seen:
            found.append(("again", seen[id(x)][0]))
        else:
            seen[id(x)] = len(seen), x
            parts = list(_parts(x))
            found.append((type(x), len(parts)))
            waiting += reversed(parts)
    return tuple(found)


def _plain(x: Any) -> tuple:
    return type(x), repr(x) if isinstance(x, float | complex) else x  # `repr` tells -0.0 from 0.0


def separate_traces(mark: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which JAX reuses only traces that were made under the same ``mark``.

    JAX caches the trace of a scan's body, of a cond's branch and of an inner `jax.jit` by the function object. If only
    a helper of that function was edited, the object is still the same, and the cached trace is stale. With None the
    context does nothing: traces are shared with all code outside.
    """
    return contextlib.nullcontext() if mark is None else _ANEW(mark)


@dataclasses.dataclass(frozen=True)
class _Told:
    """A part that is compared directly and not taken apart."""

    what: Any


class Same:
    """Wraps an object and compares by identity. It holds the object, so that the id is not reused."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


class _Equal(Same):
    """Wraps an object whose class defines equality, and compares by it. Its attributes may be caches, so they are not
    compared."""

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Equal) or type(self.x) is not type(other.x):
            return False
        try:
            return self.x is other.x or bool(self.x == other.x)
        except Exception:  # arrays of other libraries compare element by element
            return False

    def __hash__(self) -> int:
        return hash(type(self.x))


def _parts(x: Any) -> Iterator[Any]:
    """The parts of an object: other objects, and `_Told` for parts that are compared directly."""
    if isinstance(x, types.FunctionType):
        yield from _parts_of_function(x)
    elif isinstance(x, types.MethodType):
        yield from (x.__func__, x.__self__)
    elif isinstance(x, functools.partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, staticmethod | classmethod):
        yield x.__func__
    elif isinstance(x, property):
        yield from (x.fget, x.fset, x.fdel)
    elif isinstance(x, _WRAPPERS):
        yield from (_Told(Same(x)), vars(x)["__wrapped__"])
    elif isinstance(x, type):
        yield from _parts_of_class(x)
    elif isinstance(x, np.ndarray | np.generic):
        yield from _parts_of_array(x)
    elif isinstance(x, jax.Array):
        yield _Told(Same(x))
    elif isinstance(x, types.ModuleType):
        yield from _parts_of_module(x)
    elif _is_value(type(x)):
        yield _Told(_Equal(x))
    else:
        yield from _parts_of_object(x)


@functools.cache
def _is_value(kind: type) -> bool:
    """True for an installed class that defines its own equality and hash, such as `pathlib.Path`.

    Tuples, frozensets and dataclasses are excluded: they are taken apart.
    """
    container = issubclass(kind, tuple | frozenset) or dataclasses.is_dataclass(kind)
    return not container and kind.__hash__ not in (None, object.__hash__) and installed("", kind.__module__)


def _parts_of_function(f: types.FunctionType) -> Iterator[Any]:
    yield _Told(f.__code__)
    yield from (f.__defaults__, f.__kwdefaults__, vars(f))
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=False):
        try:
            x = cell.cell_contents
        except ValueError:  # the cell is empty
            x = _Told("empty")
        yield _Told(Same(x)) if type(x) in _CONTAINERS and name not in _cells(f.__code__) else x
    for chain, value in globals_of(f):
        yield _Told(chain)
        yield value


def globals_of(f: types.FunctionType) -> list[tuple[tuple[str, ...], Any]]:
    """The globals that a function's code names, as ``(chain of names, value)``; empty for code of installed packages.

    >>> def area(r):
    ...     return np.pi * r * r
    >>> [name for name, _ in globals_of(area)]
    [('np', 'pi')]
    """
    if installed(f.__code__.co_filename, f.__globals__.get("__name__") or ""):
        return []
    return [(chain, _named(f.__globals__, chain)) for chain in _globals(f.__code__)]


def _parts_of_class(x: type) -> Iterator[Any]:
    if installed("", x.__module__):
        yield _Told(Same(x))
        return
    yield _Told(x.__qualname__)
    yield x.__bases__
    for name, value in vars(x).items():
        if not (name.startswith("__") and isinstance(value, _PLAIN)) and name not in ("__dict__", "__weakref__"):
            yield _Told(name)
            yield value


def _parts_of_module(x: types.ModuleType) -> Iterator[Any]:
    yield _Told(Same(x))
    if installed("", x.__name__):
        return
    for name, value in vars(x).items():
        if not name.startswith("__") and _is_part(value):
            yield _Told(name)
            yield value


def _is_part(x: Any) -> bool:
    """True if a value in a module of the user counts.

    These are plain values, containers, arrays, instances of dataclasses (layers, settings), and functions, classes and
    objects that are not of an installed package.
    """
    if isinstance(x, (*_PLAIN, *_CONTAINERS, tuple, np.generic, jax.Array, functools.partial)):
        return True
    module = getattr(x, "__module__", None)
    own = isinstance(module, str) and not installed("", module)
    return own or (dataclasses.is_dataclass(x) and not isinstance(x, type))  # layers, and settings


def _parts_of_array(x: Any) -> Iterator[Any]:
    yield _Told((str(x.dtype), x.shape))
    numbers = np.asarray(x)
    if x.dtype.hasobject:
        yield numbers.tolist()
        return
    if x.nbytes > _WHOLE:
        yield _Told(Same(weakref.ref(x)))  # one reference object while the array lives; it does not keep it alive
        numbers = numbers.flat[:: -(-x.size // 2**16)]
    yield _Told(hashlib.sha1(np.ascontiguousarray(numbers).view(np.uint8).data, usedforsecurity=False).digest())


def _parts_of_object(x: Any) -> Iterator[Any]:
    """The class, items and attributes of an object. An object without items and attributes is compared by identity."""
    yield type(x)
    items, attributes = _items(x), _attributes(x)
    if items is None and not attributes:
        yield _Told(Same(x))
    yield from items or ()
    for name, value in attributes:
        yield _Told(name)
        yield value


def _items(x: Any) -> list[Any] | None:
    """The contents of a container; None if ``x`` is no container."""
    if isinstance(x, dict | types.MappingProxyType):
        return [part for pair in x.items() for part in pair]
    if isinstance(x, tuple | list | deque):
        return [*x]
    if isinstance(x, set | frozenset):
        return [_Told(frozenset(_plain(part) if isinstance(part, _PLAIN) else Same(part) for part in x))]
    if isinstance(x, bytearray | memoryview | array):
        return [memoryview(x).format, bytes(x)]
    return None


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """The attributes of an object, as ``(name, value)``, without values that it derives from them.

    Cached properties are left out. Of a dataclass from an installed package, only the fields count.
    """
    if dataclasses.is_dataclass(x) and installed("", type(x).__module__):
        return [(field.name, getattr(x, field.name, None)) for field in dataclasses.fields(x)]
    slots = [vars(kind).get("__slots__", ()) for kind in type(x).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    held = [(name, getattr(x, name, None)) for name in names if name not in ("__dict__", "__weakref__")]
    own = [(name, value) for name, value in getattr(x, "__dict__", {}).items() if name not in _ABOUT]
    return held + [(name, value) for name, value in own if not isinstance(_of_class(type(x), name), cached_property)]


def _of_class(kind: type, name: str) -> Any:
    """The attribute of a class or of its bases, without calling descriptors; None if there is none."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


@functools.cache
def installed(file: str, module: str) -> bool:
    """True if code belongs to an installed package, to Python or to Sapwood.

    ``file`` is the path of the code; if it is empty, it is looked up from the name ``module``.
    """
    root = module.split(".")[0]
    if root == "__main__" and not file:  # in a notebook, the file of `__main__` is that of the launcher
        return False
    if not file:
        package = sys.modules.get(root)
        file = getattr(package, "__file__", None) or next(iter(getattr(package, "__path__", ())), "")
    if (
        (root == "sapwood" and file[:1] != "<")
        or root in sys.builtin_module_names
        or file.startswith((_STANDARD, "<frozen"))
    ):
        return True
    places = file.replace("\\", "/").split("/")
    return "site-packages" in places or "dist-packages" in places


@functools.cache
def _globals(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The chains of names that code loads: a global and the attributes taken from it, such as ``("np", "pi")``.

    Functions inside the code are included. An import gives a chain that begins with ``"import"``. If code only fills a
    container, its chain ends with how: the method's name, or `ITEM`.
    """
    chains: list[list[str]] = []
    last, steps = None, _steps(code)
    for at, step in enumerate(steps):
        if step.opname in _LOADS:
            chains.append(last := [step.argval])
        elif step.opname == "IMPORT_NAME":
            module = "." * steps[at - 2].argval + step.argval  # two steps before, the level was pushed, then the names
            taken = [name for name in code.co_names if name != step.argval]
            chains += [["import", module, name] for name in taken]
            last = None
        elif step.opname in _ATTRIBUTES and last is not None:
            last.append(step.argval)
        else:
            last = None
        if last is not None and last[-1] not in METHODS and (how := fills_how(steps[at + 1 :])) is not None:
            last.append(how)
            last = None
    return tuple(
        dict.fromkeys([tuple(chain) for chain in chains] + [x for some in _inner(code) for x in _globals(some)])
    )


@functools.cache
def _cells(code: types.CodeType) -> frozenset[str]:
    """The closure variables that code uses for more than filling a container."""
    steps = _steps(code)
    own = [step.argval for at, step in enumerate(steps) if step.opname in _CELLS and fills_how(steps[at + 1 :]) is None]
    return frozenset(own).union(*map(_cells, _inner(code)))


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _named(names: dict[str, Any], chain: tuple[str, ...]) -> Any:
    """The value that a chain of names leads to.

    Only attributes of modules are followed: the attributes of any other object are parts of that object.
    """
    if chain[0] == "import":
        x, chain = _imported(names, chain[1]), chain[1:]
    else:
        x = names.get(chain[0], _Told("not there"))
    for name in chain[1:]:
        if not isinstance(x, types.ModuleType):
            return _Told(Same(x)) if type(x) in _CONTAINERS and name in (*METHODS, ITEM) else x
        as_it_is, x = installed("", x.__name__), vars(x).get(name, _Told("not there"))
        if as_it_is and not isinstance(x, types.ModuleType):
            return _Told(Same(x))
    return x


def _imported(names: dict[str, Any], module: str) -> types.ModuleType | None:
    """The module that an import statement names, ``.helpers`` or ``helpers``; None if it is not imported yet."""
    package = names.get("__package__") or names.get("__name__", "").rpartition(".")[0]
    try:
        return sys.modules.get(importlib.util.resolve_name(module, package))
    except ImportError:  # outside of any package
        return None
