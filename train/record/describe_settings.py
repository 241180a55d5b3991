"""Describe functions, optimizers and layers as texts by path, so that two processes can compare them.

Python compares functions by identity, so two calls of `optax.adam(0.1)` differ. Here a function is described by its
name, its closure and its defaults. A function of the user's own is also described by digests of its bytecode and of the
functions that it calls by name in its module or class. Installed code (optax, JAX, Sapwood) is described by name only,
so a run can resume after an upgrade.
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
"""Levels of nesting that are described; deeper objects are described by their type."""

MOST = 5000
"""Largest number of texts in one walk; further objects are described by their type."""

LONG = 64
"""Largest number of letters in a text, and of parts of an object; a digest replaces what is longer."""
LARGE = 1 << 16
"""Number of elements above which only a part of an array is digested."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, slice)
_DOCUMENTED = 0x4000000  # the flag of code with a docstring, since Python 3.13


def describe(x: Any) -> dict[str, str]:
    """Describe an object as texts by path. Digests of the user's own functions are under paths that start with "code.".

    >>> import optax
    >>> one, other = describe(optax.adam(0.1)), describe(optax.nadam(0.1))
    >>> [f"{path}: {one[path]} or {other[path]}" for path in one if one[path] != other[path]]
    ['update.update_fns.0.tx.update.nesterov: False or True']
    >>> one, other = describe(optax.sgd(0.1)), describe(optax.sgd(0.2))
    >>> [f"{path}: {one[path]} or {other[path]}" for path in one if one[path] != other[path]]
    ['update.update_fns.1.tx.update.step_size: -0.1 or -0.2']
    """
    walk = _Walk()
    walk.look("", x, ())
    code = {f"code.{name}": " ".join(["code", *sorted(marks)]) for name, marks in walk.code.items()}
    return {path.strip("."): text for path, text in {**walk.found, **code}.items()}


class _Walk:
    """One traversal of an object.

    `found` collects texts by path, `code` digests of functions by qualified name.
    """

    def __init__(self, code: dict[str, set[str]] | None = None, read: set[int] | None = None):
        self.found: dict[str, str] = {}
        self.code: dict[str, set[str]] = {} if code is None else code
        self.read: set[int] = set() if read is None else read

    def look(self, path: str, x: Any, around: tuple) -> None:
        """Record a text for ``x`` under ``path``, then do the same for its parts.

        ``around`` holds the objects that contain ``x``. An object that contains itself is described by its type.
        """
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
        """Return the name of ``x`` and its parts, as (path component, value). The code of functions is recorded."""
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
        ):  # of an optimizer (init, update) only `update` is described
            return _name(type(x)), [(name, getattr(x, name)) for name in names if (name, len(x)) != ("init", 2)]
        if isinstance(x, tuple | list):
            return type(x).__name__, _numbered(x)
        if isinstance(x, set | frozenset):
            return "set", _numbered(sorted(x, key=repr))
        if callable(getattr(x, "__wrapped__", None)):  # a wrapper, such as jax.jit makes
            return _name(x), [("wrapped", x.__wrapped__)]
        if _own(type(x)) and "__call__" in vars(type(x)):
            self.follow(vars(type(x))["__call__"], type(x))
        return _name(type(x)), _fields(x)

    def follow(self, function: Any, owner: type | None) -> None:
        """Record the digest of a function of the user's own, and follow what it refers to by name.

        ``owner`` is the class if the function is a method, else None.
        """
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
        """Record the class attributes that code names: methods, and data other than defaults of fields."""
        for called in sorted(names & set(dir(owner))):
            if _is_data(attribute := inspect.getattr_static(owner, called)):
                holder = next(base for base in owner.__mro__ if called in vars(base))
                if _own(holder) and called not in getattr(owner, "__dataclass_fields__", {}):
                    self.look(f"{path}.{called}", attribute, ())
            else:
                self.follow(_function(attribute), owner)

    def _global(self, path: str, x: Any, names: set[str], around: tuple = ()) -> None:
        """Record a global that code refers to by name: data, a module, a class or a function."""
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
    """An object as one of its methods sees it: only the fields that the method names."""

    owner: Any
    names: set[str]

    def fields(self) -> Iterator[tuple[str, Any]]:
        return ((name, x) for name, x in _fields(self.owner) if name in self.names)


def _reached(owner: type, method: Any) -> set[str]:
    """Collect the names in the code of a method, and of the methods and properties that it refers to by name."""
    todo, seen = _names(inspect.unwrap(method).__code__), set()
    while todo:
        seen.add(name := todo.pop())
        function = _function(inspect.getattr_static(owner, name, None))
        if isinstance(function, types.FunctionType):
            todo |= _names(function.__code__) - seen
    return seen


def _function(attribute: Any) -> Any:
    """Return the function behind an attribute of a class, such as a method, a property or a cached property."""
    inner = getattr(attribute, "fget", None) or getattr(attribute, "func", attribute)
    return inspect.unwrap(inner) if callable(inner) else inner


def _is_data(x: Any) -> bool:
    """Return True if an object holds values that code may read.

    Functions, classes and modules do not, nor do most objects of libraries.
    """
    if isinstance(x, type | types.ModuleType | types.FunctionType | staticmethod | classmethod | property):
        return False
    if isinstance(x, (*_PLAIN, np.ndarray, jax.Array, functools.partial, types.MethodType, types.SimpleNamespace)):
        return True
    if isinstance(x, dict | types.MappingProxyType | tuple | list | set | frozenset):  # os.environ is none of these
        return True
    return dataclasses.is_dataclass(x) or type(x).__name__ == "Namespace" or (_own(type(x)) and hasattr(x, "__dict__"))


def _fields(x: Any) -> list[tuple[str, Any]]:
    """List the fields of a dataclass, or the attributes of another object without the dunder names."""
    if dataclasses.is_dataclass(x):
        return [(field.name, getattr(x, field.name)) for field in dataclasses.fields(x) if hasattr(x, field.name)]
    return sorted((name, value) for name, value in getattr(x, "__dict__", {}).items() if not name.startswith("__"))


def _numbered(xs: Any) -> list[tuple[str, Any]]:
    return [(str(i), x) for i, x in enumerate(xs)]


def _held(function: types.FunctionType) -> list[tuple[str, Any]]:
    """List the closure variables of a function, and its defaults."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held = [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
    defaults = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    return held + [(f"default.{name}", value) for name, value in defaults.items()]


def _names(code: types.CodeType) -> set[str]:
    """Collect the names of globals and attributes that code refers to, with those of nested functions."""
    inner = [_names(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*inner)


def _digest(code: types.CodeType) -> str:
    """Digest what code does, without its place in the file and its docstring.

    A constant counts where an instruction loads it. So a docstring, which Python keeps among the constants, does not
    count.
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
    """Return True if an object is defined in the user's own code: not installed, not of the standard library."""
    module = x.__name__ if isinstance(x, types.ModuleType) else getattr(x, "__module__", None)
    root = str(module).partition(".")[0]
    if root == "sapwood" or root in sys.stdlib_module_names or root == "builtins":
        return root == "__main__"
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _name(x: Any) -> str:
    """Return a name that survives a new version of a library: its top-level package and the qualified name."""
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", None)
    if name is None:
        return _name(type(x))
    return name if _own(x) else f"{str(getattr(x, '__module__', '')).partition('.')[0]}:{name}"


def _array(x: Any) -> str:
    """Describe an array by its shape, its dtype and a digest.

    Of an array above `LARGE` elements, which may be mapped from a file, only a strided subset is digested.
    """
    try:
        some = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        if some.size > LARGE:
            some = some[tuple(slice(None, None, max(1, size // 16)) for size in some.shape)]
        mark = hashlib.blake2b(np.asarray(jax.device_get(some)).tobytes(), digest_size=8).hexdigest()
    except (RuntimeError, TypeError):  # partly on other machines, or a tracer
        mark = "somewhere"
    return f"{x.dtype}{list(x.shape)} {mark}"
