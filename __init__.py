"""Sapwood: a model is a pure function ``f(v, *inputs)`` of variables and inputs.

``import sapwood as sw`` gives the kernel, the layers and the meshes; what trains or loads data is imported when
it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from sapwood.command import starting as _starting  # noqa: F401  (before what takes a second to import)

# isort: split
from sapwood import core, layers, parallel
from sapwood.core import (
    Layer,
    Param,
    Policy,
    Spec,
    Updates,
    Vars,
    apply,
    bind,
    frozen,
    init,
    layer,
    params,
    pure,
    spec,
    stack,
    state,
    unstack,
)
from sapwood.core.errors import (
    CheckError,
    CheckpointError,
    ConfigError,
    DataError,
    DeclarationError,
    EffectError,
    InputError,
    SapwoodError,
)
from sapwood.parallel import mesh

__version__ = "0.1.0"

_LATE = {  # name -> the module it is imported from when first used (an empty string: the name is the module)
    "Recipe": "recipes.recipe",
    "TrainState": "train.state",
    "Trainer": "train.trainer",
    "data": "",
    "graph": "core.graph",
    "interop": "",
    "load": "train.artifact",
    "models": "",
    "recipes": "",
    "save": "train.artifact",
    "summary": "core.summary",
    "supervised": "train.objective",
    "train": "",
}


if TYPE_CHECKING:  # the late names for type checkers and editors
    from sapwood import data, interop, models, recipes, train
    from sapwood.core.graph import graph
    from sapwood.core.summary import summary
    from sapwood.recipes.recipe import Recipe
    from sapwood.train.artifact import load, save
    from sapwood.train.objective import supervised
    from sapwood.train.state import TrainState
    from sapwood.train.trainer import Trainer


def __getattr__(name: str):
    if name not in _LATE:
        word = "" if name.startswith("_") else _elsewhere(name)
        raise AttributeError(f"module 'sapwood' has no attribute {name!r}{word}")
    if not _LATE[name]:
        return importlib.import_module(f"sapwood.{name}")
    return getattr(importlib.import_module(f"sapwood.{_LATE[name]}"), name)


def _elsewhere(name: str) -> str:
    from sapwood.core import foreign

    if name in layers.__all__:
        return f": it is sapwood.layers.{name}, and L.{name} after `from sapwood import layers as L`"
    return foreign.answer(foreign.LAYERS | foreign.SAPWOOD, name, __all__)


def __dir__():
    return sorted({*globals(), *_LATE})


__all__ = [
    "CheckError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeclarationError",
    "EffectError",
    "InputError",
    "Layer",
    "Param",
    "Policy",
    "Recipe",
    "SapwoodError",
    "Spec",
    "TrainState",
    "Trainer",
    "Updates",
    "Vars",
    "apply",
    "bind",
    "core",
    "data",
    "frozen",
    "graph",
    "init",
    "interop",
    "layer",
    "layers",
    "load",
    "mesh",
    "models",
    "parallel",
    "params",
    "pure",
    "recipes",
    "save",
    "spec",
    "stack",
    "state",
    "summary",
    "supervised",
    "train",
    "unstack",
]
