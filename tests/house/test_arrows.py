"""Imports go only along the arrows, and what is heavy is imported where it is first used."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ARROWS = {  # a room -> the rooms below it, from which it may import
    "core": set(),
    "runtime": {"core"},
    "parallel": {"core"},
    "metrics": {"core", "parallel"},
    "losses": {"core", "parallel", "metrics"},
    "layers": {"core", "parallel"},
    "data": {"core", "parallel", "layers"},
    "saving": {"core", "runtime", "parallel", "data"},
    "models": {"core", "parallel", "layers"},
    "train": {"core", "runtime", "parallel", "metrics", "losses", "data", "saving"},
}
ARROWS["inspection"] = {*ARROWS, "layers"}
ARROWS["interop"] = {*ARROWS}
ARROWS["experiment"] = {*ARROWS}
ARROWS["recipes"] = {*ARROWS}
ARROWS["command"] = {*ARROWS}
MAY_IMPORT_THE_WHOLE = {"interop", "recipes", "command"}  # `import sapwood as sw`, as a user writes it
LIGHT = {"jax", "numpy"}  # what core, parallel and layers may import at module level; numpy comes with jax


def imports(tree: ast.AST, package: tuple[str, ...], *, top_level_only: bool = False):
    """Yield (line, dotted name) of every import below `tree`, also of `importlib.import_module("...")`."""
    for node in _top_level(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node).endswith("import_module"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            yield from ((node.lineno, name) for name in names if name.startswith("sapwood"))


def _called(node: ast.Call) -> str:
    """The last word of what is called (`ast.unparse` of each call would be most of the time of these tests)."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _top_level(tree: ast.AST):
    """The nodes that run at import: all but the bodies of functions and of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


@functools.cache
def tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def distributions() -> dict[str, list[str]]:
    """Which distributions bring a module: this looks through all that is installed."""
    return dict(packages_distributions())


def modules(root: Path):
    return [(room, path) for room in ARROWS for path in sorted((root / room).rglob("*.py"))]


def broken_arrows(room: str, tree: ast.AST, package: tuple[str, ...]):
    for line, name in imports(tree, package):
        top, _, rest = name.partition(".")
        if top != "sapwood" or room in MAY_IMPORT_THE_WHOLE:
            continue
        target = rest.split(".")[0]
        if target != room and target not in ARROWS[room]:
            yield f"line {line}: {room} imports {name}"


def heavy_imports(tree: ast.AST, package: tuple[str, ...]):
    for line, name in imports(tree, package, top_level_only=True):
        top = name.split(".")[0]
        if top not in LIGHT | {"sapwood"} and top not in sys.stdlib_module_names:
            yield f"line {line}: {name}"


def _package(root: Path, path: Path) -> tuple[str, ...]:
    return ("sapwood", *path.relative_to(root).parent.parts)


def test_every_room_has_its_arrows(root):
    assert {init.parent.name for init in root.glob("*/__init__.py")} <= set(ARROWS)


def test_imports_follow_the_arrows(root):
    broken = {
        path.relative_to(root).as_posix(): found
        for room, path in modules(root)
        if (found := list(broken_arrows(room, tree(path), _package(root, path))))
    }
    assert not broken


def test_import_sapwood_loads_only_jax(root):
    heavy = {
        path.relative_to(root).as_posix(): found
        for room, path in modules(root)
        if room in ("core", "parallel", "layers") and (found := list(heavy_imports(tree(path), _package(root, path))))
    }
    assert not heavy


OPTIONAL = {"treescope", "datasets", "zstandard"}  # used where they are there; what users must bring says how to get it


def test_every_import_is_a_declared_dependency(root):
    """What arrives only because another package happens to need it may leave with that package's next version."""
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[^\w-]", d)[0].lower().replace("_", "-") for d in dependencies}
    known = distributions()
    loose = set()
    for _room, path in [*modules(root), *(("", p) for p in root.glob("*.py"))]:
        for _line, name in imports(tree(path), _package(root, path)):
            top = name.split(".")[0]
            if top == "sapwood" or top in sys.stdlib_module_names or top in OPTIONAL:
                continue
            if not {d.lower().replace("_", "-") for d in known.get(top, [top])} & declared:
                loose.add(f"{path.relative_to(root).as_posix()}: {top}")
    assert not loose


def test_tests_import_only_what_the_test_extra_brings(root):
    """Anything else goes through `pytest.importorskip`; a bare import would stop the whole collection. Scripts that ask
    an oracle are no tests, and take what the extra `oracles` brings."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements):
        return {re.split(r"[^\w-]", r)[0].lower().replace("_", "-") for r in requirements}

    of_tests = names(project["dependencies"] + extras["test"])
    known = distributions()
    loose = set()
    for path in (root / "tests").rglob("*.py"):
        declared = of_tests | names(extras["oracles"]) if path.stem.endswith("_oracle") else of_tests
        local = {p.stem for p in path.parent.iterdir()}
        for _line, name in imports(tree(path), ("tests",)):
            top = name.split(".")[0]
            if top in {"sapwood", "tests", "benchmarks", *local} or top in sys.stdlib_module_names:
                continue
            if not {d.lower().replace("_", "-") for d in known.get(top, [top])} & declared:
                loose.add(f"{path.relative_to(root).as_posix()}: {top}")
    assert not loose


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("core", "from sapwood.layers import Dense"),
        ("core", "import sapwood"),
        ("layers", "def f():\n    from ..train import loop"),
        ("layers", "from .. import data"),
        ("train", "import sapwood.layers.linear.dense as d"),
        ("data", "import importlib\nimportlib.import_module('sapwood.train')"),
    ],
)
def test_the_check_sees_a_broken_arrow(room, source):
    assert list(broken_arrows(room, ast.parse(source), ("sapwood", room)))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("layers", "from sapwood.core.vars import Vars"),
        ("layers", "from .dense import Dense"),
        ("train", "from ..data import x"),
    ],
)
def test_the_check_lets_arrows_pass(room, source):
    assert not list(broken_arrows(room, ast.parse(source), ("sapwood", room)))


def test_the_check_sees_heavy_imports_only_where_they_run():
    used = ast.parse("try:\n    import rich\nexcept ImportError:\n    pass")
    assert list(heavy_imports(used, ("sapwood", "core")))
    assert not list(heavy_imports(ast.parse("def f():\n    import rich"), ("sapwood", "core")))
