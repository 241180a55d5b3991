"""References: a model written down as the name it is imported by and its options, so that data can name code.

What comes back from a file is imported from an installed module, and nothing else is run: the name must be that of a
function outside Python's standard library, which is not called, or of a frozen dataclass (every `Layer` and `Recipe` is
one), which is made anew from its options. A recipe file that is no module of a package is named by its path, and found
where this process has run that file itself (`sapwood.recipes.find`): to read a saved model runs no file.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.layer import Layer

Plain = None | bool | int | float | str


def write(model: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What JSON can hold of a model.

    `model` is a function, a frozen dataclass such as a `Layer`, a method of one, or the name of one of these,
    "package.module:name". `options` are keyword arguments of a function or the fields of a dataclass.

    Raises ConfigError for what cannot be imported by a name (a lambda, a function inside another or in `__main__`), and
    for options that cannot be written down.

    >>> from sapwood import layers as L
    >>> write(L.Dense(10, bias=False))["options"]["features"]
    10
    """
    if isinstance(model, str):
        written: dict[str, Any] = {"name": model}
        if options is not None:
            written["options"] = {name: _value(name, x) for name, x in options.items()}
        read(written)
        return written
    if options is not None:
        raise ConfigError("options= go with a model given by name; this one has its own")
    owner = getattr(model, "__self__", None)
    if owner is not None and not isinstance(owner, type) and _frozen(type(owner)):
        return write(owner) | {"method": model.__name__}
    return _by_name(model) or _dataclass(model)


def read(written: Mapping[str, Any]) -> Callable[..., Any]:
    """The model that `write` wrote down. CheckpointError where it cannot be imported here, or is no model."""
    name, options = written["name"], written.get("options")
    target = _resolve(name, written.get("file"))
    if isinstance(target, type):
        if not _frozen(target):
            raise CheckpointError(f"{name} is no Layer, recipe or other frozen dataclass; it is not made from a file")
        try:
            target = target(**{key: _read_value(value) for key, value in (options or {}).items()})
        except TypeError as error:
            raise CheckpointError(f"{name} cannot be made with its options: {error}") from error
        method = written.get("method")
        if method is not None:
            target = getattr(target, method, None)
    elif options is not None:
        target = functools.partial(target, **{key: _read_value(value) for key, value in options.items()})
    if not callable(target):
        raise CheckpointError(f"{name} is no model: it cannot be called")
    return target


def _by_name(model: Any) -> dict[str, Any] | None:
    """The reference of something that stands in its module under its own name."""
    named = getattr(model, "function", model) if isinstance(model, Layer) else model
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", None)
    if module is None or name is None:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if module != "__main__" and found is not None and (found is model or found == model):
        written = {"name": f"{module}:{name}"}
        return written if _importable(module) else written | {"file": sys.modules[module].__file__}
    if isinstance(model, Layer) and named is model:
        return None
    raise ConfigError(
        f"{module}:{name} cannot be imported by that name, so no other program could find it; put it at the top level "
        "of a module that is installed, or save without model="
    )


def _importable(module: str) -> bool:
    """Whether another program finds the module by its name; not where it was made of a file by its path."""
    return "." in module or any(finder.find_spec(module, None) is not None for finder in sys.meta_path)


def _dataclass(model: Any) -> dict[str, Any]:
    if not _frozen(type(model)):
        raise ConfigError(f"a model is a function or a frozen dataclass such as a Layer, not {type(model).__name__}")
    written = _by_name(type(model))
    assert written is not None
    fields = [field.name for field in dataclasses.fields(model) if field.init]
    return written | {"options": {name: _value(name, getattr(model, name)) for name in fields}}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, Plain):
        return value
    if isinstance(value, list):
        return [_value(name, x) for x in value]
    if isinstance(value, tuple):
        return {"tuple": [_value(name, x) for x in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _value(name, x) for key, x in value.items()}}
    try:
        return {"model": write(value)}
    except ConfigError as error:
        raise ConfigError(f"the option {name} cannot be written down: {error}") from None


def _read_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_read_value(x) for x in value]
    if not isinstance(value, Mapping):
        return value
    (kind, inner), *rest = value.items()
    if rest or kind not in ("tuple", "dict", "model"):
        raise CheckpointError(f"this option of a model was not written by Sapwood: {value!r}")
    if kind == "tuple":
        return tuple(_read_value(x) for x in inner)
    if kind == "dict":
        return {key: _read_value(x) for key, x in inner.items()}
    return read(inner)


def _resolve(name: str, file: str | None) -> Any:
    module, _, attributes = name.partition(":")
    if file is not None and getattr(sys.modules.get(module), "__file__", None) != file:
        raise CheckpointError(
            f"the model is of the recipe file {file}, which reading a saved model does not run; if you trust it, "
            f"sapwood.recipes.find({file!r}) does, and the model is found"
        )
    if not attributes:
        raise ConfigError(f'model={name!r}: write "package.module:name"')
    if module.split(".")[0] in sys.stdlib_module_names:
        raise CheckpointError(f"{name} is Python's own, not a model; it is not loaded from a file")
    try:
        found: Any = importlib.import_module(module)
        for part in attributes.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"the model {name} cannot be imported here: {error}") from error
    return found


def _frozen(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
