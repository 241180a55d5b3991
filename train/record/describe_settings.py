"""What a function, an optimizer or a layer is made of, as texts by path that two processes can compare.

Python compares functions by object, so that two calls of `optax.adam(0.1)` are two. Here a function is its name and
what it closes over; one of the user's own is its code, too, with what that calls by name in its file or class. Code
that is installed (optax, JAX, Sapwood) counts by name: its versions may change, and a run still goes on.
"""

import dataclasses
import dis
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DEEPEST = 24
"""Levels that are looked into; what lies deeper counts by its type."""

MOST = 5000
"""Things that are looked at in one walk; what comes later counts by its type."""

LONG = 64
"""Parts, and letters, of which one digest is taken where there are more."""
LARGE = 1 << 16
"""Elements of an array of which all are read."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, slice)
_DOCUMENTED = 0x4000000  # the flag of code with a docstring, since Python 3.13


def described(x: Any) -> dict[str, str]:
    """What something is made of, by path. The code of one's own functions stands under "code".

    >>> import optax
    >>> one, other = described(optax.adam(0.1)), described(optax.nadam(0.1))
    >>> [f"{path}: {one[path]} or {other[path]}" for path in one if one[path] != other[path]]
    ['update.update_fns.0.tx.update.nesterov: False or True']
    >>> one, other = described(optax.sgd(0.1)), described(optax.sgd(0.2))
    >>> [f"{path}: {one[path]} or {other[path]}" for path in one if one[path] != other[path]]
    ['update.update_fns.1.tx.update.step_size: -0.1 or -0.2']
    """
    walk = _Walk()
    walk.look("", x, ())
    code = {f"code.{name}": " ".join(["code", *sorted(marks)]) for name, marks in walk.code.items()}
    return {path.strip("."): text for path, text in {**walk.found, **code}.items()}


class _Walk:
    """One walk over something: the texts that were found, and the digests of code by qualified name."""

    def __init__(self, code: dict[str, set[str]] | None = None, read: set[int] | None = None):
        self.found: dict[str, str] = {}
        self.code: dict[str, set[str]] = {} if code is None else code
        self.read: set[int] = set() if read is None else read

    def look(self, path: str, x: Any, around: tuple) -> None:
        """Note what x is, and look at its parts."""
        if isinstance(x, _PLAIN):
            text = repr(x)
            self.found[path] = text if len(text) <= LONG else f"{text[:LONG]}... {_mark(text)}"
            return
        if isinstance(x, np.ndarray | jax.Array):
            self.found[path] = _array(x)
            return
        if len(around) > DEEPEST or len(self.found) > MOST or any(x is outer for outer in around):
            self.found[path] = _name(type(x))
            return
        around = (*around, x)
        name, parts = self._parts(x)
        self.found[path] = name
        if len(parts) <= LONG:
            for part, value in parts:
                self.look(f"{path}.{part}", value, around)
            return
        inner = _Walk(self.code, self.read)
        for part, value in parts:
            inner.look(part, value, around)
        self.found[path] = f"{name} of {len(parts)}, {_mark(repr(inner.found))}"

    def _parts(self, x: Any) -> tuple[str, list[tuple[str, Any]]]:
        """What x is called, and what it is made of."""
        if isinstance(x, types.MethodType):
            if isinstance(x.__self__, type):
                self.follow(x.__func__, x.__self__)
                return _name(x.__func__), []
            self.follow(x.__func__, type(x.__self__))
            return _name(x.__func__), [("self", _Seen(x.__self__, _reached(type(x.__self__), x.__func__)))]
        if isinstance(x, types.FunctionType):
            self.follow(x, None)
            return _name(x), _held(x)
        if isinstance(x, _Seen):
            return _name(type(x.owner)), list(x.fields())
        if isinstance(x, functools.partial):
            return "partial", [("function", x.func), *_numbered(x.args), *sorted(x.keywords.items())]
        if isinstance(x, type | types.ModuleType | types.BuiltinFunctionType):
            return _name(x), []
        if isinstance(x, Mapping):
            return "dict", sorted(((str(key), value) for key, value in x.items()), key=lambda pair: pair[0])
        if isinstance(x, tuple) and (
            names := getattr(x, "_fields", ())
        ):  # of an optimizer what it does, not how it begins
            return _name(type(x)), [(name, getattr(x, name)) for name in names if (name, len(x)) != ("init", 2)]
        if isinstance(x, tuple | list):
            return type(x).__name__, _numbered(x)
        if isinstance(x, set | frozenset):
            return "set", _numbered(sorted(x, key=repr))
        if callable(getattr(x, "__wrapped__", None)):  # what jax.jit and its like have made
            return _name(x), [("wrapped", x.__wrapped__)]
        if _own(type(x)) and "__call__" in vars(type(x)):
            self.follow(vars(type(x))["__call__"], type(x))
        return _name(type(x)), _fields(x)

    def follow(self, function: Any, owner: type | None) -> None:
        """Note the code of a function of one's own, and what it calls by name."""
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, types.FunctionType) or not _own(function) or id(function) in self.read:
            return
        self.read.add(id(function))
        name = function.__qualname__
        self.code.setdefault(name, set()).add(_digest(function.__code__))
        names = _names(function.__code__)
        for called in {name for name in names if not name.startswith("__")} & function.__globals__.keys():
            self._global(f".code.{name}.{called}", function.__globals__[called], names)
        if owner is not None:
            self._attributes(f".code.{name}", owner, names)

    def _attributes(self, path: str, owner: type, names: set[str]) -> None:
        """What code names of a class: its methods, and what it holds that is no default of a field."""
        for called in sorted(names & set(dir(owner))):
            if _is_data(attribute := inspect.getattr_static(owner, called)):
                holder = next(base for base in owner.__mro__ if called in vars(base))
                if _own(holder) and called not in getattr(owner, "__dataclass_fields__", {}):
                    self.look(f"{path}.{called}", attribute, ())
            else:
                self.follow(_function(attribute), owner)

    def _global(self, path: str, x: Any, names: set[str], around: tuple = ()) -> None:
        """A name that code refers to outside of itself."""
        if _is_data(x):
            self.look(path, x, ())
        elif isinstance(x, types.ModuleType):
            if _own(x) and not any(x is outer for outer in around):
                for called in sorted(name for name in names & vars(x).keys() if not name.startswith("__")):
                    self._global(f"{path}.{called}", vars(x)[called], names, (*around, x))
        elif isinstance(x, type):
            self.follow(vars(x).get("__call__"), x)
            if _own(x):
                self._attributes(path, x, names)
        else:
            self.follow(x, None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """An object as a method sees it: those of its fields that the method names."""

    owner: Any
    names: set[str]

    def fields(self) -> Iterator[tuple[str, Any]]:
        return ((name, x) for name, x in _fields(self.owner) if name in self.names)


def _reached(owner: type, method: Any) -> set[str]:
    """The names in the code of a method, and in that of the methods and properties that it calls by name."""
    todo, seen = _names(inspect.unwrap(method).__code__), set()
    while todo:
        seen.add(name := todo.pop())
        function = _function(inspect.getattr_static(owner, name, None))
        if isinstance(function, types.FunctionType):
            todo |= _names(function.__code__) - seen
    return seen


def _function(attribute: Any) -> Any:
    """The function of an attribute of a class: of a method, a property and what else is made of one."""
    inner = getattr(attribute, "fget", None) or getattr(attribute, "func", attribute)
    return inspect.unwrap(inner) if callable(inner) else inner


def _is_data(x: Any) -> bool:
    """Whether something holds values that code may read: no function, class or module, and no object of a library."""
    if isinstance(x, type | types.ModuleType | types.FunctionType | staticmethod | classmethod | property):
        return False
    if isinstance(x, (*_PLAIN, np.ndarray, jax.Array, functools.partial, types.MethodType, types.SimpleNamespace)):
        return True
    if isinstance(x, dict | types.MappingProxyType | tuple | list | set | frozenset):  # not the process's environment
        return True
    return dataclasses.is_dataclass(x) or type(x).__name__ == "Namespace" or (_own(type(x)) and hasattr(x, "__dict__"))


def _fields(x: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(x):
        return [(field.name, getattr(x, field.name)) for field in dataclasses.fields(x) if hasattr(x, field.name)]
    return sorted((name, value) for name, value in getattr(x, "__dict__", {}).items() if not name.startswith("__"))


def _numbered(xs: Any) -> list[tuple[str, Any]]:
    return [(str(i), x) for i, x in enumerate(xs)]


def _held(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function closes over, and its defaults."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held = [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
    defaults = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    return held + [(f"default.{name}", value) for name, value in defaults.items()]


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*inner)


def _digest(code: types.CodeType) -> str:
    """What code does, without where it stands and what it says of itself.

    A constant counts where it is taken, so a docstring, which Python keeps among the constants, counts nowhere.
    """
    steps = [
        (step.opname, _constant(step.argval) if step.opcode in dis.hasconst else step.argrepr)
        for step in dis.get_instructions(code)
    ]
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_varnames, code.co_freevars
    return _mark(repr((steps, code.co_exceptiontable, arguments, code.co_flags & ~_DOCUMENTED)))


def _constant(x: Any) -> str:
    if isinstance(x, types.CodeType):
        return _digest(x)
    return repr(sorted(x, key=repr) if isinstance(x, frozenset) else x)


def _mark(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _own(x: Any) -> bool:
    """Whether something is defined in code of the user's own, which is not installed."""
    module = x.__name__ if isinstance(x, types.ModuleType) else getattr(x, "__module__", None)
    root = str(module).partition(".")[0]
    if root == "sapwood" or root in sys.stdlib_module_names or root == "builtins":
        return root == "__main__"
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _name(x: Any) -> str:
    """A name that a new version of a library keeps: its package, and what it is called there."""
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", None)
    if name is None:
        return _name(type(x))
    return name if _own(x) else f"{str(getattr(x, '__module__', '')).partition('.')[0]}:{name}"


def _array(x: Any) -> str:
    """Shape, dtype and a digest; of a large array that of numbers here and there, for it may be a file's."""
    try:
        some = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        if some.size > LARGE:
            some = some[tuple(slice(None, None, max(1, size // 16)) for size in some.shape)]
        mark = hashlib.blake2b(np.asarray(jax.device_get(some)).tobytes(), digest_size=8).hexdigest()
    except (RuntimeError, TypeError):  # partly on other machines, or traced
        mark = "somewhere"
    return f"{x.dtype}{list(x.shape)} {mark}"
