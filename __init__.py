"""Sapwood: a model is a pure function ``f(v, *inputs)`` of variables and inputs.

``import sapwood as sw`` gives the kernel, the layers and the meshes; what trains or loads data is imported when
it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sapwood.command import starting as _starting  # noqa: F401  (before what takes a second to import)

# isort: split
from sapwood import core, layers, parallel
from sapwood.core import initializers
from sapwood.core import vars_pytree as _vars_pytree  # noqa: F401  (makes a cursor a pytree)
from sapwood.core.apply import apply
from sapwood.core.bind import bind, params, pure, state
from sapwood.core.effects import Updates
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
from sapwood.core.init import init
from sapwood.core.layer import Layer, layer
from sapwood.core.param import Param
from sapwood.core.policy import Policy
from sapwood.core.spec import Spec, spec
from sapwood.core.stack_trees import stack, unstack
from sapwood.core.vars import Vars, frozen
from sapwood.core.version import __version__
from sapwood.parallel import mesh

_LATE = {  # name -> the module it is imported from when first used (an empty string: the name is the module)
    "Recipe": "experiment.recipe",
    "TrainState": "train.state.train_state",
    "Trainer": "train.trainer",
    "callbacks": "train",
    "data": "",
    "experiment": "",
    "graph": "inspection.graphs.graph",
    "inspection": "",
    "interop": "",
    "load": "saving.artifact",
    "losses": "",
    "metrics": "",
    "models": "",
    "recipes": "",
    "save": "saving.artifact",
    "saving": "",
    "summary": "inspection.summaries.summary",
    "supervised": "train.objectives.supervised",
    "train": "",
}


if TYPE_CHECKING:  # the late names for type checkers and editors
    from sapwood import data, experiment, inspection, interop, losses, metrics, models, recipes, saving, train
    from sapwood.experiment.recipe import Recipe
    from sapwood.inspection.graphs.graph import graph
    from sapwood.inspection.summaries.summary import summary
    from sapwood.saving.artifact import load, save
    from sapwood.train import callbacks
    from sapwood.train.objectives.supervised import supervised
    from sapwood.train.state.train_state import TrainState
    from sapwood.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        word = "" if name.startswith("_") else _elsewhere(name)
        raise AttributeError(f"module 'sapwood' has no attribute {name!r}{word}")
    if not _LATE[name]:
        return importlib.import_module(f"sapwood.{name}")
    return getattr(importlib.import_module(f"sapwood.{_LATE[name]}"), name)


def _elsewhere(name: str) -> str:
    from sapwood.core import migration_hints

    if name in layers.__all__:
        return f": it is sapwood.layers.{name}, and L.{name} after `from sapwood import layers as L`"
    return migration_hints.answer(migration_hints.LAYERS | migration_hints.SAPWOOD, name, __all__)


def __dir__() -> list[str]:
    return __all__


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
    "__version__",
    "apply",
    "bind",
    "callbacks",
    "core",
    "data",
    "experiment",
    "frozen",
    "graph",
    "init",
    "initializers",
    "inspection",
    "interop",
    "layer",
    "layers",
    "load",
    "losses",
    "mesh",
    "metrics",
    "models",
    "parallel",
    "params",
    "pure",
    "recipes",
    "save",
    "saving",
    "spec",
    "stack",
    "state",
    "summary",
    "supervised",
    "train",
    "unstack",
]
