"""Ready experiments, one a file: what ``sapwood train NAME`` runs, and what to copy when you start your own."""

from sapwood.recipes.recipe import Recipe
from sapwood.recipes.registry import BUILT_IN, find

__all__ = ["BUILT_IN", "Recipe", "find"]
