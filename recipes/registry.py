"""Finding a recipe: by its name, or by the path of a Python file."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from sapwood.core.errors import ConfigError
from sapwood.core.paths import nearest
from sapwood.recipes.recipe import Recipe

BUILT_IN = ("digits", "digits-mlp", "text")


def find(name: str) -> type[Recipe]:
    """The recipe called ``name``: a built-in one, or the one a file such as ``path/to/my_recipe.py`` defines.

    Raises `ConfigError` for an unknown name (with the nearest ones), a missing file, and a file with no recipe in it,
    or several.

    >>> find("digits").__name__
    'Digits'
    """
    if name in BUILT_IN:
        return _only_recipe(importlib.import_module(f"sapwood.recipes.{name.replace('-', '_')}"), name)
    if not name.endswith(".py"):
        raise ConfigError(
            f"there is no recipe {name!r}{nearest(name, BUILT_IN)} (recipes: {', '.join(BUILT_IN)}; or the path of a "
            "Python file that defines one)"
        )
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"there is no recipe file {name}")
    spec = importlib.util.spec_from_file_location(f"sapwood_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return _only_recipe(module, name)


def _only_recipe(module, name: str) -> type[Recipe]:
    found = [
        x
        for x in vars(module).values()
        if inspect.isclass(x) and issubclass(x, Recipe) and x.__module__ == module.__name__
    ]
    if len(found) != 1:
        classes = ", ".join(x.__name__ for x in found) or "none"
        raise ConfigError(f"{name}: a recipe file defines one subclass of sapwood.Recipe; this one has {classes}")
    return found[0]
