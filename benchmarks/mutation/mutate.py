"""Small faults ("mutants") in Sapwood's source, made in memory while a module is imported. No file is changed.

`sites(file, source)` lists the possible faults of a source file. `mutated(source, site)` is the syntax tree with one of
them. `reaching(source, sites)` is the tree that reports when a statement with a site runs. `install` makes Python
import `sapwood` through these trees.
"""

import ast
import copy
import dataclasses
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


@dataclasses.dataclass(frozen=True)
class Site:
    """A fault and its place. If the file has changed since, its place is the nearest one with the code `before`."""

    file: str
    line: int
    column: int
    kind: str
    before: str
    after: str


def _fault(node: ast.AST) -> tuple[str, ast.AST] | None:
    """The kind of a node's fault and the node that replaces it; None if the node has no fault."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            return "comparison", ast.Compare(node.left, [COMPARISONS[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in ARITHMETIC and not _text(node.left) and not _text(node.right):
            return "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(op)](), node.right)
        case ast.BoolOp(op=op):
            return "boolean", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return "sign", node.operand
        case ast.Constant(value=bool(value)):
            return "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            return "constant", ast.Constant(value + 1)
        case ast.If(test=test):
            return "condition", ast.If(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)
        case ast.IfExp(test=test):
            return "condition", ast.IfExp(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            return "statement", ast.Pass()
    return None


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _functions(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements inside functions. Those that run at import are left out, since every test would reach them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__repr"):
            yield from node.body


def _candidates(statement: ast.stmt) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """The nodes of a statement, each with the innermost statement around it, without error messages and annotations."""
    stack: list[tuple[ast.AST, ast.stmt]] = [(statement, statement)]
    while stack:
        node, around = stack.pop()
        if isinstance(node, ast.Raise | ast.Assert | ast.FunctionDef | ast.ClassDef | ast.JoinedStr):
            continue
        around = node if isinstance(node, ast.stmt) else around
        yield node, around
        hidden = {id(node.annotation)} if isinstance(node, ast.AnnAssign) else set()
        stack += [(child, around) for child in ast.iter_child_nodes(node) if id(child) not in hidden]


def _found(tree: ast.AST) -> list[tuple[ast.AST, ast.stmt]]:
    """The nodes that can have a fault, in the order of `ast.walk`, each with the innermost statement around it."""
    found = {}
    for statement in _functions(tree):
        for node, around in _candidates(statement):
            if _fault(node):
                found[id(node)] = (node, around)
    return [found[id(node)] for node in ast.walk(tree) if id(node) in found]


def _says(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0]


def _at(tree: ast.AST, site: Site) -> tuple[ast.AST, ast.stmt]:
    """The node of a site, and the statement around it. Raises `LookupError` if the file has no such code any more."""
    like = [(node, around) for node, around in _found(tree) if _kind(node) == site.kind and _says(node) == site.before]
    if not like:
        raise LookupError(f"{site.file} has no {site.kind} {site.before!r} any more: draw the faults anew")
    return min(like, key=lambda x: (abs(x[0].lineno - site.line), abs(x[0].col_offset - site.column)))  # pyright: ignore


def _kind(node: ast.AST) -> str | None:
    fault = _fault(node)
    return fault and fault[0]


def sites(file: str, source: str) -> list[Site]:
    """All possible faults of a source file."""
    found = []
    for node, _ in _found(ast.parse(source)):
        kind, other = _fault(node)  # pyright: ignore[reportGeneralTypeIssues]
        before, after = _says(node), _says(copy.deepcopy(other))
        found.append(Site(file, node.lineno, node.col_offset, kind, before, after))  # pyright: ignore
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, node: ast.AST, others: list[ast.AST]):
        self.node, self.others = node, others

    def visit(self, node: ast.AST):
        if node is not self.node:
            return self.generic_visit(node)
        made = [ast.copy_location(x, node) for x in self.others if x is not node]
        made += [node] * (node in self.others)
        return made if isinstance(node, ast.stmt) else made[0]


def mutated(source: str, site: Site) -> ast.AST:
    """The syntax tree of a file with this one fault."""
    tree = ast.parse(source)
    node, _ = _at(tree, site)
    fault = _fault(node)
    assert fault is not None
    tree = _Replace(node, [fault[1]]).visit(tree)
    return ast.fix_missing_locations(tree)


def reaching(source: str, numbered: dict[int, Site]) -> ast.AST:
    """The syntax tree of a file with a call of `__reached__(n)` before the statement with site n."""
    tree = ast.parse(source)
    places = {number: _at(tree, site)[1] for number, site in numbered.items()}
    for number, around in places.items():
        call = ast.parse(f"__import__('builtins').__reached__({number})").body[0]
        tree = _Replace(around, [call, around]).visit(tree)
    return ast.fix_missing_locations(tree)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of `sapwood` as Python does, but loads those in `trees` by `_Loader`."""

    def __init__(self, trees):
        self.trees = trees  # from a path relative to the package's root to a function of the source

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith("sapwood."):
            return None
        file = fullname.removeprefix("sapwood.").replace(".", "/")
        for name in (f"{file}.py", f"{file}/__init__.py"):
            if name in self.trees:
                spec = importlib.machinery.PathFinder.find_spec(fullname, path)
                if spec is not None and spec.origin is not None:
                    spec.loader = _Loader(fullname, spec.origin, self.trees[name])
                return spec
        return None


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname, path, tree):
        super().__init__(fullname, path)
        self.tree = tree

    def get_code(self, fullname):
        return compile(self.tree(Path(self.path).read_text(encoding="utf-8")), self.path, "exec", dont_inherit=True)


def install(listed: list[Site], mutant: int | None, reached: Path | None) -> None:
    """Import `sapwood` with a fault, or with reports of the tests that reach each fault.

    ``mutant`` is the index of the fault in ``listed``. If it is None, ``reached`` is the directory for the reports. If
    both are None, nothing changes.
    """
    if mutant is not None:
        site = listed[mutant]
        sys.meta_path.insert(0, _Finder({site.file: lambda source: mutated(source, site)}))
    elif reached is not None:
        _report_to(reached)
        by_file: dict[str, dict[int, Site]] = {}
        for number, site in enumerate(listed):
            by_file.setdefault(site.file, {})[number] = site
        trees = {file: (lambda source, some=some: reaching(source, some)) for file, some in by_file.items()}
        sys.meta_path.insert(0, _Finder(trees))


def _report_to(directory: Path) -> None:
    import builtins

    seen = set()

    def reached(number):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        if test and (test, number) not in seen:
            seen.add((test, number))
            with open(directory / f"{os.getpid()}.txt", "a", encoding="utf-8") as file:
                file.write(f"{number} {test}\n")

    builtins.__reached__ = reached  # pyright: ignore[reportAttributeAccessIssue]
