"""Experiments: a `Recipe` (model, data, optimizer, hyper-parameters), and `Experiment`, a recipe in a run directory.

`find` looks a recipe up by its name or by the path of its file. Ready recipes are in `sapwood.recipes`.
"""

from sapwood.experiment.experiment import Experiment
from sapwood.experiment.finding import BUILT_IN, find
from sapwood.experiment.recipe import Recipe

__all__ = ["BUILT_IN", "Experiment", "Recipe", "find"]
