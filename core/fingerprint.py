"""`fingerprint`: all that some functions are made of, so that one can see whether anything of it was edited since."""

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

from sapwood.core.write_only import ITEM, METHODS, filled

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_STANDARD = sysconfig.get_paths()["stdlib"]
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_CELLS = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter, bytearray, np.ndarray)
_WHOLE = 2**22
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_ABOUT = ("__doc__", "__module__", "__name__", "__qualname__", "__annotations__")
_WRAPPERS = (type(jax.jit(len)), type(functools.cache(len)))
_ANEW = jax.make_user_context(None)


def fingerprint(*roots: Any) -> tuple:
    """What these values and functions are made of now, as something that compares.

    A function is its code, its defaults, what it closes over, and each global that its code names, with whatever that
    is made of in turn; `helpers.block` is looked up in the module, a class is its methods, an object its class and
    attributes, an array its numbers (JAX's arrays, which never change, are themselves). A module of which code takes
    more than that is what is defined in it. Code of installed packages is taken as it is. So two fingerprints differ
    where a helper was edited, a global set or a module reloaded in between.
    What a function reads from elsewhere, such as a file or an environment variable, is in none.

    Two things are taken for less than they hold. A NumPy array of more than 4 MiB is itself and a sample of 65 536 of
    its numbers: another one in its place is seen, and what is written into a part of it may not be. A container that
    code only puts something into, as ``log.append(x)`` in a callback does, is itself, whatever is in it.

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
    seen: dict[int, tuple[int, Any]] = {}  # with the object itself: the id of one that is gone may be given anew
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
    return type(x), repr(x) if isinstance(x, float | complex) else x  # which tells -0.0 from 0.0


def traced_anew(mark: Any) -> contextlib.AbstractContextManager[Any]:
    """Within the block JAX takes nothing that it traced outside of it, or under another mark.

    JAX keeps what it traced of the body of a scan, a branch of a cond or an inner `jax.jit` by the function object,
    which stays the same where only a helper of it was edited. None is where everybody is.
    """
    return contextlib.nullcontext() if mark is None else _ANEW(mark)


@dataclasses.dataclass(frozen=True)
class _Told:
    """A part that is compared as it stands."""

    what: Any


class Same:
    """An object that equals itself alone. It is held, so that no other one is ever taken for it."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


class _Equal(Same):
    """An object of a class of values, which may keep what it has made of them."""

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, _Equal) or type(self.x) is not type(other.x):
            return False
        try:
            return self.x is other.x or bool(self.x == other.x)
        except Exception:  # arrays of other libraries say so of each number
            return False

    def __hash__(self) -> int:
        return hash(type(self.x))


def _parts(x: Any) -> Iterator[Any]:
    """What an object is made of: other objects, and `_Told` for what is compared as it stands."""
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
    """Whether objects of an installed class, such as `pathlib.Path`, say themselves which ones are equal."""
    container = issubclass(kind, tuple | frozenset) or dataclasses.is_dataclass(kind)
    return not container and kind.__hash__ not in (None, object.__hash__) and installed("", kind.__module__)


def _parts_of_function(f: types.FunctionType) -> Iterator[Any]:
    yield _Told(f.__code__)
    yield from (f.__defaults__, f.__kwdefaults__, vars(f))
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=False):
        try:
            x = cell.cell_contents
        except ValueError:  # not filled yet
            x = _Told("empty")
        yield _Told(Same(x)) if type(x) in _CONTAINERS and name not in _cells(f.__code__) else x
    for chain, value in globals_of(f):
        yield _Told(chain)
        yield value


def globals_of(f: types.FunctionType) -> list[tuple[tuple[str, ...], Any]]:
    """The globals that a function's code names, each with its value now; none for code of installed packages.

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
    """Whether a name of a module of one's own counts: values, and functions, classes and objects that are one's own."""
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
        yield _Told(Same(weakref.ref(x)))  # the same reference while the array is there, which it does not keep
        numbers = numbers.flat[:: -(-x.size // 2**16)]
    yield _Told(hashlib.sha1(np.ascontiguousarray(numbers).view(np.uint8).data, usedforsecurity=False).digest())


def _parts_of_object(x: Any) -> Iterator[Any]:
    """The class, items and attributes of an object; one that shows nothing of what is in it is itself."""
    yield type(x)
    items, attributes = _items(x), _attributes(x)
    if items is None and not attributes:
        yield _Told(Same(x))
    yield from items or ()
    for name, value in attributes:
        yield _Told(name)
        yield value


def _items(x: Any) -> list[Any] | None:
    """What a container holds; None for what is none."""
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
    """The attributes of an object by name, without what it keeps of what it has made of them: no cached properties, and
    of an installed dataclass its fields."""
    if dataclasses.is_dataclass(x) and installed("", type(x).__module__):
        return [(field.name, getattr(x, field.name, None)) for field in dataclasses.fields(x)]
    slots = [vars(kind).get("__slots__", ()) for kind in type(x).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    held = [(name, getattr(x, name, None)) for name in names if name not in ("__dict__", "__weakref__")]
    own = [(name, value) for name, value in getattr(x, "__dict__", {}).items() if name not in _ABOUT]
    return held + [(name, value) for name, value in own if not isinstance(_of_class(type(x), name), cached_property)]


def _of_class(kind: type, name: str) -> Any:
    """The attribute of a class, as it stands there."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


@functools.cache
def installed(file: str, module: str) -> bool:
    """Whether code comes from a package that was installed, or from Python or Sapwood itself."""
    root = module.split(".")[0]
    if root == "__main__" and not file:  # in a notebook it is that of whatever runs it
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
    """The globals that code names, with the attributes that it takes of each, functions inside it included. What it
    imports is a chain that begins with "import"; a container that is filled ends with how."""
    chains: list[list[str]] = []
    last, steps = None, _steps(code)
    for at, step in enumerate(steps):
        if step.opname in _LOADS:
            chains.append(last := [step.argval])
        elif step.opname == "IMPORT_NAME":
            module = "." * steps[at - 2].argval + step.argval  # the level and the names come before
            taken = [name for name in code.co_names if name != step.argval]
            chains += [["import", module, name] for name in taken]
            last = None
        elif step.opname in _ATTRIBUTES and last is not None:
            last.append(step.argval)
        else:
            last = None
        if last is not None and last[-1] not in METHODS and (how := filled(steps[at + 1 :])) is not None:
            last.append(how)
            last = None
    return tuple(
        dict.fromkeys([tuple(chain) for chain in chains] + [x for some in _inner(code) for x in _globals(some)])
    )


@functools.cache
def _cells(code: types.CodeType) -> frozenset[str]:
    """The names of what a function closes over that its code does more with than fill it."""
    steps = _steps(code)
    own = [step.argval for at, step in enumerate(steps) if step.opname in _CELLS and filled(steps[at + 1 :]) is None]
    return frozenset(own).union(*map(_cells, _inner(code)))


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _named(names: dict[str, Any], chain: tuple[str, ...]) -> Any:
    """What a chain of names leads to: attributes of modules are followed, those of other objects are in the object."""
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
    """The module that an import statement names, ``.helpers`` or ``helpers``; None before it is there."""
    package = names.get("__package__") or names.get("__name__", "").rpartition(".")[0]
    try:
        return sys.modules.get(importlib.util.resolve_name(module, package))
    except ImportError:  # outside of any package
        return None
