"""The kernel: cursors, declarations, initialisation and running. It knows no mesh and no training."""

from sapwood.core import crossing as crossing  # makes a cursor a pytree
from sapwood.core.collect import Updates
from sapwood.core.init import init
from sapwood.core.layer import Layer, layer
from sapwood.core.param import Param, Stacked
from sapwood.core.policy import Policy
from sapwood.core.run import apply, bind, params, pure, state
from sapwood.core.spec import Spec, spec
from sapwood.core.stacking import stack, unstack
from sapwood.core.vars import Vars, frozen

__all__ = [
    "Layer",
    "Param",
    "Policy",
    "Spec",
    "Stacked",
    "Updates",
    "Vars",
    "apply",
    "bind",
    "frozen",
    "init",
    "layer",
    "params",
    "pure",
    "spec",
    "stack",
    "state",
    "unstack",
]
