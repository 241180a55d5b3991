"""Model references: a model written to JSON as its import name and its options, and read back safely.

A saved file may come from a stranger, so `read` accepts a name only under three conditions:

- Its module belongs to Sapwood (layers, models, recipes), to JAX (`jax.nn`, and functions that are jitted), or to a
  package that the caller trusts (`sw.load(trust="my_project")`). Nothing is imported before this is checked.
- It names a function or a class that a trusted module defines itself at its top level. Attributes of attributes and
  names that the module only imports are refused, unless the module that defines them is trusted too.
- Its options are fields of a frozen dataclass (every `Layer` and `Recipe` is one) or parameters of a function.

A recipe file outside every package is named by its path. `read` finds its module only if this process has run the file
already (`sapwood.experiment.find`). Reading a saved model never runs a file.
"""

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.layer import Function, Layer
from sapwood.core.trusted_packages import is_dotted, is_in_packages, refusal

Plain = None | bool | int | float | str

RECIPE = "sapwood_recipe_"
"""Prefix of the module name of a recipe file outside every package. The file's own name follows."""

MOVED = {
    **{f"sapwood.layers.{old}": "sapwood.layers" for old in (
        "attention", "conv", "dense", "dropout", "embedding", "grouped_matmul", "mixture", "normalization", "pooling",
        "positions", "remat", "reshape", "ring", "routing", "scan", "sequential", "ulysses", "vmap")},
    "sapwood.models.decoder": "sapwood.models",
    "sapwood.recipes.digits": "sapwood.recipes.vision.digits",
    "sapwood.recipes.digits_mlp": "sapwood.recipes.vision.digits_mlp",
    "sapwood.recipes.text": "sapwood.recipes.language.text",
}  # fmt: skip
"""Maps modules that Sapwood 0.1 wrote into artifacts to the modules that hold their names now.

Add an entry for each module that moves.
"""

_CLASSES = ("sapwood.recipes",)
_MODELS = ("sapwood.layers", "sapwood.models", "sapwood.core.layer", "sapwood.core.initializers")
_MATH = ("jax.nn", "jax._src.nn")
_JITTED = ("jax.numpy", "jax.lax", "jax._src.numpy", "jax._src.lax")


def write(model: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a model as JSON types: its import name, its options and its method.

    Args:
        model: a function, a frozen dataclass such as a `Layer`, a method of one, or the name of one of these as
            "package.module:name".
        options: keyword arguments of a function or fields of a dataclass. Only for a model that is named by a string.

    Raises:
        ConfigError: the model cannot be imported by a name (a lambda, a function inside another function or in
            `__main__`), or JSON cannot hold an option.
        CheckpointError: `model` is a string that names nothing that can be imported here.

    >>> from sapwood import layers as L
    >>> write(L.Dense(10, bias=False))["options"]["features"]
    10
    """
    if isinstance(model, str):
        written: dict[str, Any] = _home(model)
        if options is not None:
            written["options"] = {name: _value(name, x) for name, x in options.items()}
        read(written, trust=[written["name"].split(":")[0]])
        return written
    if options is not None:
        raise ConfigError("options= go with a model given by name; this one has its own")
    owner = getattr(model, "__self__", None)
    if owner is not None and not isinstance(owner, type) and _frozen(type(owner)):
        return write(owner) | {"method": model.__name__}
    return _by_name(model) or _dataclass(model)


def read(written: Mapping[str, Any], trust: Iterable[str] = ()) -> Callable[..., Any]:
    """The model of a reference that `write` made. `trust` names packages that it may come from.

    Raises CheckpointError if its package is not trusted, if it cannot be imported here, or if it is not a model.
    """
    try:
        return _read(written, tuple(trust))
    except RecursionError:
        raise CheckpointError("the options of this model lie in each other without end") from None


def _read(written: Any, trust: tuple[str, ...]) -> Callable[..., Any]:
    if not isinstance(written, Mapping) or not {"name"} <= set(written) <= {"name", "file", "options", "method"}:
        raise CheckpointError(f"this model was not written down by Sapwood: {_brief(written)}")
    name, options, method = written["name"], written.get("options"), written.get("method")
    target = _resolve(name, written.get("file"), trust)
    given = {} if options is None else options
    if not isinstance(given, Mapping) or not isinstance(method, str | None):
        raise CheckpointError(f"the options of {name} were not written down by Sapwood: {_brief(written)}")
    unknown = sorted(set(given) - set(_declared(name, target)))
    if unknown:
        raise CheckpointError(f"{name} cannot be made with its options: it declares no {', '.join(unknown[:5])}")
    values = {key: _read_value(value, trust) for key, value in given.items()}
    if isinstance(target, type):
        try:
            target = target(**values)
        except Exception as error:  # its own checks refuse values that were changed
            raise CheckpointError(f"{name} cannot be made with its options: {error}") from error
        if method is not None:
            target = _method(name, target, method)
    elif method is not None:
        raise CheckpointError(f"{name} is a function, which has no method {method!r}")
    elif options is not None:
        target = functools.partial(target, **values)
    if not callable(target):
        raise CheckpointError(f"{name} is no model: it cannot be called")
    return target


def _declared(name: str, target: Any) -> list[str]:
    """The names of the options that `target` takes: fields of a dataclass, or parameters of a function."""
    if not isinstance(target, type):
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(getattr(target, "function", target)).parameters
        return [word for word, parameter in parameters.items() if parameter.kind in named]
    if not _frozen(target):
        raise CheckpointError(f"{name} is no Layer, recipe or other frozen dataclass; it is not made from a file")
    return [field.name for field in dataclasses.fields(target) if field.init]


def _method(name: str, owner: Any, method: str) -> Callable[..., Any]:
    if method.startswith("_") or not inspect.isfunction(inspect.getattr_static(type(owner), method, None)):
        raise CheckpointError(f"{name} is no model: it has no method {method!r}")
    return getattr(owner, method)


def _home(name: str) -> dict[str, Any]:
    """The reference of an object that the caller names, written with the module that defines the object."""
    module, _, attribute = name.partition(":")
    if not is_dotted(module) or not attribute.isidentifier():
        raise ConfigError(f'model={name!r}: write "package.module:name"')
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"the model {name} cannot be imported here: {error}") from error
    written = _by_name(found) if callable(found) else None
    if written is None:
        raise CheckpointError(f"{name} is no model: a function or a class is expected")
    return written


def _by_name(model: Any) -> dict[str, Any] | None:
    """The reference of a function or class that its module holds under its own name.

    None for an object without a name, and for a `Layer` that is not a function. Raises ConfigError for a function or
    class that cannot be imported by its name.
    """
    named = _named(model)
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", None)
    if module is None or name is None:
        return None
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if module != "__main__" and found is not None and (found is model or found == model):
        written = {"name": f"{_public(module, found)}:{name}"}
        return written if _importable(module) else written | {"file": sys.modules[module].__file__}
    if isinstance(model, Layer) and named is model:
        return None
    raise ConfigError(
        f"{module}:{name} cannot be imported by that name, so no other program could find it; put it at the top level "
        "of a module that is installed, or save without model="
    )


def _public(module: str, found: Any) -> str:
    """The module to write into a reference to `found`, which `module` defines.

    It is the package of Sapwood that exports `found`, such as `sapwood.layers`: its name stays when files move.
    Otherwise it is `module`.
    """
    room = ".".join(module.split(".")[:2])
    exports = getattr(sys.modules.get(room), "__all__", ()) if module.startswith("sapwood.") else ()
    name = _named(found).__qualname__
    return room if name in exports and getattr(sys.modules[room], name) is found else module


def _named(model: Any) -> Any:
    """The object that carries the name: for a layer that `sw.layer` made, its function; else the model."""
    return model.function if isinstance(model, Function) else model


def _importable(module: str) -> bool:
    """Whether another program can import the module by its name. False for a module made from the path of a file."""
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


def _read_value(value: Any, trust: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_read_value(x, trust) for x in value]
    if not isinstance(value, Mapping):
        return value
    match next(iter(value.items())) if len(value) == 1 else None:
        case ("tuple", list() as inner):
            return tuple(_read_value(x, trust) for x in inner)
        case ("dict", Mapping() as inner):
            return {key: _read_value(x, trust) for key, x in inner.items()}
        case ("model", Mapping() as inner):
            return _read(inner, trust)
    raise CheckpointError(f"this option of a model was not written by Sapwood: {_brief(value)}")


def _resolve(name: Any, file: Any, trust: tuple[str, ...]) -> Any:
    """The function or class called `name`. Its module is imported only if it is trusted."""
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    module = MOVED.get(module, module)
    if not is_dotted(module) or not attribute.isidentifier():
        raise CheckpointError(f"this names no model: {_brief(name)}; package.module:name is expected")
    if file is not None:
        found = vars(_ran(module, file)).get(attribute)
    else:
        _allow(name, module, trust)
        try:
            found = vars(importlib.import_module(module)).get(attribute)
        except Exception as error:  # a module may raise anything while it is imported
            raise CheckpointError(f"the model {name} cannot be imported here: {error}") from error
    if found is None:
        raise CheckpointError(f"the model {name} cannot be imported here: {module} has no {attribute}")
    named = _named(found)
    home = getattr(named, "__module__", None)
    if not callable(named) or getattr(named, "__qualname__", None) != attribute or not isinstance(home, str):
        raise CheckpointError(f"{name} is no model: a function or a class of that name is expected")
    if home != module:
        _allow(f"{home}:{attribute}", home, trust)
    if not is_in_packages(trust, home) and not _is_part(home, named):
        said = "not jitted, so it may do more than compute" if is_in_packages(_JITTED, home) else "no recipe"
        raise CheckpointError(f"{name} is {said}; if you trust it all the same: sw.load(..., trust={home!r})")
    return found


def _is_part(home: str, found: Any) -> bool:
    """Whether an object of Sapwood or JAX may be part of a model.

    In `sapwood.recipes` only classes may, and in `jax.numpy` and `jax.lax` only jitted functions, because these access
    no file.
    """
    if is_in_packages(_CLASSES, home):
        return isinstance(found, type)
    return hasattr(found, "lower") if is_in_packages(_JITTED, home) else True


def _ran(module: str, file: Any) -> ModuleType:
    """The module of a recipe file that this process has run.

    If the file no longer exists, a module of the same name is accepted. Otherwise raises CheckpointError.
    """
    ran = sys.modules.get(module) if module.startswith(RECIPE) else None
    if ran is None or not isinstance(file, str) or (ran.__file__ != file and Path(file).exists()):
        raise CheckpointError(
            f"the model is of the recipe file {_brief(file)}, which reading a saved model does not run; if you trust "
            f"it, sapwood.experiment.find({_brief(file)!r}) does, or find of where it lies now, and the model is found"
        )
    return ran


def _allow(name: str, module: str, trust: tuple[str, ...]) -> None:
    """Raise CheckpointError unless the module may be imported because a file names it."""
    top = module.split(".")[0]
    if top not in sys.stdlib_module_names and is_in_packages((*trust, *_MODELS, *_CLASSES, *_MATH, *_JITTED), module):
        return
    if top == "sapwood":
        raise CheckpointError(f"{name} is neither a layer, a model nor a recipe; it is not made from a file")
    raise CheckpointError(refusal(f"the model {name}", module, "sw.load"))


def _frozen(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
