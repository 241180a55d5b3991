"""`fingerprint`: all that some functions are made of, so that one can see whether anything of it was edited since."""

import contextlib
import dataclasses
import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_STANDARD = sysconfig.get_paths()["stdlib"]
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_ABOUT = ("__doc__", "__module__", "__name__", "__qualname__", "__annotations__")
_WRAPPERS = (type(jax.jit(len)), type(functools.cache(len)))
_ANEW = jax.make_user_context(None)


def fingerprint(*roots: Any) -> tuple:
    """What these values and functions are made of now, as something that compares.

    A function is its code, its defaults, what it closes over, and each global that its code names, with whatever that
    is made of in turn; `helpers.block` is looked up in the module, a class is its methods, an object its class and
    attributes, an array its numbers (JAX's arrays, which never change, are themselves). Code of installed packages is
    taken as it is. So two fingerprints differ where a helper was edited, a global set or a module reloaded in between.
    What a function reads from elsewhere, such as a file or an environment variable, is in none.

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
            found.append((type(x), repr(x) if isinstance(x, float | complex) else x))  # which tells -0.0 from 0.0
        elif id(x) in seen:
            found.append(("again", seen[id(x)][0]))
        else:
            seen[id(x)] = len(seen), x
            parts = list(_parts(x))
            found.append((type(x), len(parts)))
            waiting += reversed(parts)
    return tuple(found)


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


class _Same:
    """An object that equals itself alone. It is held, so that no other one is ever taken for it."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


class _Equal(_Same):
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
        yield from (_Told(_Same(x)), vars(x)["__wrapped__"])
    elif isinstance(x, type):
        yield from _parts_of_class(x)
    elif isinstance(x, np.ndarray | np.generic):
        yield from _parts_of_array(np.asarray(x))
    elif isinstance(x, jax.Array | types.ModuleType):
        yield _Told(_Same(x))
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
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield _Told("empty")
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
        yield _Told(_Same(x))
        return
    yield _Told(x.__qualname__)
    yield x.__bases__
    for name, value in vars(x).items():
        if not (name.startswith("__") and isinstance(value, _PLAIN)) and name not in ("__dict__", "__weakref__"):
            yield _Told(name)
            yield value


def _parts_of_array(x: np.ndarray) -> Iterator[Any]:
    yield _Told((str(x.dtype), x.shape))
    if x.dtype.hasobject:
        yield x.tolist()
    else:
        yield _Told(hashlib.sha1(np.ascontiguousarray(x).view(np.uint8).data, usedforsecurity=False).digest())


def _parts_of_object(x: Any) -> Iterator[Any]:
    """The class, items and attributes of an object; one that shows nothing of what is in it is itself."""
    yield type(x)
    items, attributes = _items(x), _attributes(x)
    if items is None and not attributes:
        yield _Told(_Same(x))
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
        return [_Told(frozenset(part if isinstance(part, _PLAIN) else _Same(part) for part in x))]
    return None


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """The attributes of an object by name, without what it keeps of what it has made of them: no cached properties, and
    of a dataclass its fields."""
    if dataclasses.is_dataclass(x):
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
    """The globals that code names, with the attributes that it takes of each, functions inside it included; what it
    imports is a chain that begins with "import"."""
    chains: list[list[str]] = []
    last = None
    for step in dis.get_instructions(code):
        if step.opname in _LOADS:
            chains.append(last := [step.argval])
        elif step.opname == "IMPORT_NAME":
            taken = [name for name in code.co_names if name != step.argval]
            chains += [["import", step.argval, name] for name in taken]
            last = None
        elif step.opname in _ATTRIBUTES and last is not None:
            last.append(step.argval)
        elif step.opname not in ("CACHE", "EXTENDED_ARG"):
            last = None
    inner = [_globals(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(dict.fromkeys([tuple(chain) for chain in chains] + [chain for some in inner for chain in some]))


def _named(names: dict[str, Any], chain: tuple[str, ...]) -> Any:
    """What a chain of names leads to: attributes of modules are followed, those of other objects are in the object."""
    if chain[0] == "import":
        package = names.get("__package__") or ""
        x = sys.modules.get(chain[1]) or sys.modules.get(f"{package}.{chain[1]}")
        chain = chain[1:]
    else:
        x = names.get(chain[0], _Told("not there"))
    for name in chain[1:]:
        if not isinstance(x, types.ModuleType):
            return x
        as_it_is, x = installed("", x.__name__), vars(x).get(name, _Told("not there"))
        if as_it_is and not isinstance(x, types.ModuleType):
            return _Told(_Same(x))
    return x
