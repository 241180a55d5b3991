"""Find a recipe by its name or by the path of a Python file.

A file is executed each time it is looked up, so a recipe is always the file as it was edited last. `find_of_run`
executes a file that a run directory names only with the user's consent (`sapwood.experiment.consent`).
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from pathlib import Path

from sapwood.core.errors import CheckpointError, ConfigError, SapwoodError
from sapwood.core.messages import nearest
from sapwood.experiment import consent
from sapwood.experiment.recipe import Recipe
from sapwood.saving.model_reference import RECIPE

BUILT_IN = {"digits": "vision.digits", "digits-mlp": "vision.digits_mlp", "text": "language.text"}
"""Maps the name of each built-in recipe to its module in `sapwood.recipes`."""


def find(name: str) -> type[Recipe]:
    """The recipe class called ``name``: a built-in recipe, or the one that the file ``path/to/my_recipe.py`` defines.

    A file may import modules from its own folder, as a script does. Raises `ConfigError` for an unknown name (the
    message names the nearest ones), a missing file, a file that cannot be imported, and a file that does not define
    exactly one recipe.

    >>> find("digits").__name__
    'Digits'
    """
    if name in BUILT_IN:
        return _only_recipe(importlib.import_module(f"sapwood.recipes.{BUILT_IN[name]}"), name)
    if not name.endswith(".py"):
        raise ConfigError(
            f"there is no recipe {name!r}{nearest(name, BUILT_IN)} (recipes: {', '.join(BUILT_IN)}; or the path of a "
            "Python file that defines one)"
        )
    file = Path(name).expanduser()
    return _only_recipe(_import(file, read(file)), name)


def find_of_run(name: str, trust: str | None, run: Path) -> type[Recipe]:
    """The recipe class of a run: a built-in recipe, or a file that the user has run before or names now.

    A run directory may come from a stranger, so a file is not run just because a run directory names or contains it.

    Args:
        name: the recipe as the run's config names it.
        trust: the path of the recipe file to run instead; naming it here gives consent. None runs the file ``name``
            only if the user has run this version of it before (`sapwood.experiment.consent`).
        run: the run directory, for messages.

    Raises:
        CheckpointError: the user's consent is missing.
        ConfigError: as `find` does.
    """
    if trust is None and (name in BUILT_IN or not name.endswith(".py")):
        return find(name)
    file = Path(trust or name).expanduser()
    if trust is None and not file.exists():
        raise ConfigError(f"there is no recipe file {file}; --trust says where it lies now (in Python: trust=)")
    source = read(file)
    if trust is None and not consent.given(file, source):
        raise CheckpointError(
            f"{run} is of the recipe file {file}, which you have not run as it is now, so it is not run because a "
            f"directory names it; look at it, and if you trust it: --trust {file} (in Python: trust=)"
        )
    recipe = _only_recipe(_import(file, source), str(file))
    consent.remember(file, source)
    return recipe


def agree(name: str) -> None:
    """Record the user's consent to a recipe file, so that commands that read the run later may run it again."""
    if name not in BUILT_IN:
        with contextlib.suppress(ConfigError):  # the file was removed in the meantime
            consent.remember(Path(name), read(Path(name)))


def read(file: Path) -> bytes:
    """The source of a recipe file. Raises `ConfigError` if there is no such file."""
    if not file.is_file():
        raise ConfigError(f"there is no recipe file {file}")
    return file.read_bytes()


def full_name(name: str) -> str:
    """The name of a recipe as a run stores it: the absolute path of a file, or the name of a built-in recipe."""
    return name if name in BUILT_IN else str(Path(name).expanduser().resolve())


def _import(file: Path, source: bytes) -> types.ModuleType:
    """Import a Python file as a module. An error in it becomes a `ConfigError` that names the line."""
    path = file.resolve()
    try:
        return _in_package(path, source) or _alone(path, source)
    except SapwoodError:
        raise
    except SyntaxError as error:  # in this file, or in one that it imports
        at = file if error.filename in (None, str(path)) else error.filename
        raise ConfigError(f"{at}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{file}{where}: {type(error).__name__}: {error}") from error


def _in_package(path: Path, source: bytes) -> types.ModuleType | None:
    """Import a file that belongs to an importable package, under its name in that package.

    So other programs can import it by that name too. None if the file belongs to no such package.
    """
    names, folder = [path.stem], path.parent
    while (folder / "__init__.py").exists():
        names, folder = [folder.name, *names], folder.parent
    package = importlib.util.find_spec(names[0]) if len(names) > 1 else None
    places = (package.submodule_search_locations or ()) if package is not None else ()
    if folder in _BESIDE or folder / names[0] not in [Path(place).resolve() for place in places]:
        return None  # no package, or a different one of that name
    name = ".".join(names)
    parent = importlib.import_module(name.rpartition(".")[0])
    module = _run(name, path, source)
    setattr(parent, path.stem, module)
    return module


_BESIDE: set[Path] = set()
"""Folders that this process has added to `sys.path`. Other processes do not import from them."""


def _alone(path: Path, source: bytes) -> types.ModuleType:
    """Import a file outside every package. It may import modules from its own folder, also later in its methods.

    The folder goes to the end of `sys.path`, so a file in it never replaces an installed library. Raises `ConfigError`
    if the file imports a name that exists in its folder and was loaded from elsewhere.
    """
    folder = path.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        _BESIDE.add(folder)
        importlib.invalidate_caches()
    module = _run(f"{RECIPE}{path.stem}", path, source)
    for name in _imports(source):
        beside = [file for file in (folder / f"{name}.py", folder / name / "__init__.py") if file.is_file()]
        found = getattr(sys.modules.get(name), "__file__", None)
        if beside and found is not None and Path(found).resolve() not in [file.resolve() for file in beside]:
            raise ConfigError(f"{path} imports {name!r}, which is {found} here, and {beside[0]} lies beside it; "
                              "rename that, or begin a new process if it is of another recipe")  # fmt: skip
    return module


def _imports(source: bytes) -> set[str]:
    """The top-level names of the modules that a file imports with absolute imports."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    of = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    return {name.partition(".")[0] for name in plain + of}


def _run(name: str, path: Path, source: bytes) -> types.ModuleType:
    """Execute a file as the module ``name``. It is executed on each call, so that edits take effect.

    If it raises, the module that had the name before is put back.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _only_recipe(module: types.ModuleType, name: str) -> type[Recipe]:
    found = [
        x
        for x in vars(module).values()
        if inspect.isclass(x) and issubclass(x, Recipe) and x.__module__ == module.__name__
    ]
    if len(found) != 1:
        classes = ", ".join(x.__name__ for x in found) or "none"
        raise ConfigError(f"{name}: a recipe file defines one subclass of sapwood.Recipe; this one has {classes}")
    (recipe,) = found
    typed = {word for word, kind in inspect.get_annotations(recipe).items() if "ClassVar" not in str(kind)}
    if typed and "__dataclass_fields__" not in vars(recipe):
        raise ConfigError(f"{name}: {', '.join(sorted(typed))} of {recipe.__name__} would not be hyper-parameters; "
                          f"write @dataclass(frozen=True) above class {recipe.__name__}")  # fmt: skip
    for field in dataclasses.fields(recipe):
        if field.name in vars(recipe) and field.name not in typed:  # a dataclass ignores it
            raise ConfigError(f"{name}: {field.name} of {recipe.__name__} would stay what it is in the class that "
                              f"{recipe.__name__} is made of; write its type, too, as in {field.name}: int = ..."
                              )  # fmt: skip
    return recipe
