"""Imports go only along the arrows, and what is heavy is imported where it is first used."""

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Callable
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


def imports(tree: ast.AST, package: tuple[str, ...], *, of: Callable = ast.walk):
    """Yield (line, dotted name) of every import among the nodes of `tree`, also of `importlib.import_module("...")`."""
    for node in of(tree):
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
        if _is_for_types(node):
            continue
        yield node
        yield from _top_level(node)


def _run(tree: ast.AST):
    """The nodes that ever run: all but the bodies of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not _is_for_types(node):
            yield node
            yield from _run(node)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


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
    for line, name in imports(tree, package, of=_top_level):
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


def test_no_modules_import_each_other_in_a_circle(root):
    """Imports inside functions count; those for type checkers do not, for they never run."""
    assert circles(import_graph(root)) == []


@functools.cache
def import_graph(root: Path) -> dict[str, set[str]]:
    """The modules of the package, and which of them each one imports, at its top or inside a function."""
    files = {_module(root, path): path for _room, path in modules(root)}

    def imported(path: Path) -> set[str]:
        names = {name for _line, name in imports(tree(path), _package(root, path), of=_run)}
        return {name if name in files else name.rpartition(".")[0] for name in names}

    return {name: imported(path) & files.keys() for name, path in files.items()}


def _module(root: Path, path: Path) -> str:
    return ".".join(("sapwood", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules of which each one reaches all others (Tarjan 1972)."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in number:
                visit(target)
            if target in stack:
                lowest[name] = min(lowest[name], lowest[target])
        if lowest[name] == number[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1 or name in graph[name]:
                found.append(sorted(group))

    for name in graph:
        if name not in number:
            visit(name)
    return found


def test_the_check_sees_a_circle(tmp_path):
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "one.py").write_text("def f():\n    from sapwood.core import two\n")
    (tmp_path / "core" / "two.py").write_text("from sapwood.core.one import f\n")
    (tmp_path / "core" / "types.py").write_text("if TYPE_CHECKING:\n    from sapwood.core.types import f\n")
    assert circles(import_graph(tmp_path)) == [["sapwood.core.one", "sapwood.core.two"]]


def hidden(folder: Path, name: str) -> set[str]:
    """The files and folders of the package `name` whose names its `__init__.py` binds to something else.

    `import sapwood.layers.dense as d` would give the function of that name.
    """
    beside = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    bound = set()
    for node in ast.walk(tree(folder / "__init__.py")):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module != name:
            bound |= {alias.asname or alias.name for alias in node.names}
    return beside & bound


def packages(root: Path) -> list[Path]:
    return sorted({path.parent for _room, path in modules(root)})


def test_no_file_is_hidden_by_a_name_of_its_package(root):
    found = {name: hidden(folder, name) for folder in packages(root) if (name := _module(root, folder / "__init__.py"))}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_check_sees_a_hidden_file(tmp_path):
    (tmp_path / "dense.py").touch()
    (tmp_path / "__init__.py").write_text("from sapwood.layers.linear.dense import dense\n")
    assert hidden(tmp_path, "sapwood.layers") == {"dense"}


def test_no_room_has_the_name_of_a_module_of_python(root):
    """The root is where Python is started, so a folder `inspect` there would be imported in the place of Python's."""
    assert {room for room in ARROWS if room in sys.stdlib_module_names} == set()


def test_no_file_has_the_name_of_a_module_of_python(root):
    """Python that is started in a folder imports from there first. (A command's file is called as the command is.)"""
    files = {path.relative_to(root).as_posix() for _room, path in modules(root) if path.stem in sys.stdlib_module_names}
    assert files == {"command/profile.py"}


def test_every_room_says_what_is_in_it(root):
    silent = [folder for folder in packages(root) if not ast.get_docstring(tree(folder / "__init__.py"))]
    assert silent == []


def drawn(root: Path) -> str:
    """The rooms from the bottom to the top: which rooms each imports from (of those that others reach, the nearest),
    and the rooms inside it."""
    lines = []
    for room in ARROWS:
        used = {t.split(".")[1] for n, ts in import_graph(root).items() if n.split(".")[1] == room for t in ts} - {room}
        below = set().union(*(ARROWS[name] for name in used)) if used else set()
        nearest = [name for name in ARROWS if name in used - below]
        inner = sorted(p.parent.name for p in (root / room).glob("*/__init__.py"))
        line = f"{room:<12}{'-> ' + ', '.join(nearest) if nearest else '':<34}{' '.join(f'{name}/' for name in inner)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def test_contributing_shows_the_house_as_it_is(root):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```text\n{drawn(root)}\n```" in text, f"the house in CONTRIBUTING.md is now:\n{drawn(root)}"


OPTIONAL = {"treescope", "datasets", "zstandard"}  # used where they are there; what users must bring says how to get it


def test_every_import_is_a_declared_dependency(root):
    """What arrives only because another package happens to need it may leave with that package's next version."""
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[^\w-]", d)[0].lower().replace("_", "-") for d in dependencies}
    known = distributions()
    loose = set()
    for _room, path in [*modules(root), *(("", root / name) for name in ("__init__.py", "__main__.py"))]:
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
