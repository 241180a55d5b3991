"""Experiments: `Recipe` (model, data, optimizer and hyper-parameters) and `Experiment` (a recipe in a run directory).

`find` looks up a recipe by its name or by the path of its file. Built-in recipes are in `sapwood.recipes`.
"""

from sapwood.experiment.experiment import Experiment
from sapwood.experiment.finding import BUILT_IN, find
from sapwood.experiment.recipe import Recipe

__all__ = ["BUILT_IN", "Experiment", "Recipe", "find"]
