"""`summary`: layers, shapes, parameters, bytes and FLOPs of a model, as a table or, in a notebook, a tree.

The model is traced in eval mode. Rows are the paths with layer calls and the variables that belong to no layer. A scope
that only leads to one other row has no row of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sapwood.core import paths
from sapwood.core.errors import ConfigError
from sapwood.core.layer import describe
from sapwood.core.param import Param
from sapwood.inspection.data_flow import Flow, live, trace_flow
from sapwood.inspection.flops import FlopCounter
from sapwood.inspection.layer_calls import LayersByPath, TracedModel, layer_label, layers_by_path, trace_calls
from sapwood.inspection.summaries.rows import Row, size


@dataclass(frozen=True)
class Summary:
    """The result of `summary`: a `Row` for each path, and the totals of the model.

    It prints as a plain table; `show()` prints a rich one; a notebook shows a tree that opens and closes.

    Attributes:
        model: the name of the model.
        inputs: dtypes and shapes of the inputs.
        output: dtypes and shapes of the output.
        rows: one `Row` for each path, in the order in which the model first uses them.
        params: the number of elements of all parameters.
        state: the number of elements of all state.
        param_bytes: bytes of all parameters as they are stored.
        state_bytes: bytes of all state as it is stored.
        flops: floating-point operations of one call in eval mode.
    """

    model: str
    inputs: str
    output: str
    rows: tuple[Row, ...]
    params: int
    state: int
    param_bytes: int
    state_bytes: int
    flops: int

    def __repr__(self) -> str:
        from sapwood.inspection.summaries.text import text

        return text(self)

    def __rich__(self) -> Any:
        from sapwood.inspection.summaries.text import rich_table

        return rich_table(self)

    def show(self) -> None:
        """Print the table to the terminal, in color if the terminal supports it."""
        from rich.console import Console

        Console().print(self)

    def _repr_html_(self) -> str:
        from sapwood.inspection.summaries.tree import html

        return html(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from sapwood.inspection.summaries.tree import Tree

        return Tree(self).__treescope_repr__(path, subtree_renderer)

    @property
    def totals(self) -> str:
        """The last line of the table: parameters, state and FLOPs of the model."""
        parts = [f"{self.params:,} parameters ({size(self.param_bytes)})"]
        if self.state:
            parts.append(f"{self.state:,} numbers of state ({size(self.state_bytes)})")
        return ", ".join([*parts, f"{self.flops:,} FLOPs"])


def summary(model: Callable, *xs: Any, policy: Any = None, depth: int | None = None) -> Summary:
    """A table of ``model(v, *xs)``: path, layer, output, parameters, bytes and FLOPs, and the totals.

    Nothing is computed. FLOPs are those of one call in eval mode, by XLA's cost analysis of the traced program: a
    multiply-add is two, the body of a scan counts for each step, that of ``while`` once. A parameter that is used in
    several places counts once. Bytes are those of parameters and state as they are stored.

    Args:
        model: a layer or a function of a cursor and ``xs``.
        xs: arrays or `jax.ShapeDtypeStruct`, in any pytree.
        policy: the precision policy; None for the default.
        depth: show only rows whose paths have at most this many names, at least 1; None shows all.

    Raises:
        ConfigError: ``depth`` is below 1, or a dimension is symbolic. Errors of `sw.spec` are raised too.

    >>> import jax, jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> def model(v, x):
    ...     return L.Dense(10)(v.logits, jax.nn.relu(L.Dense(16)(v.hidden, x)))
    >>> summary(model, jnp.ones((8, 4)))
    model(float32[8,4]) -> float32[8,10]
    path    layer      output         parameters  bytes  FLOPs
    ------  ---------  -------------  ----------  -----  -----
    hidden  Dense(16)  float32[8,16]          80  320 B  1,152
    logits  Dense(10)  float32[8,10]         170  680 B  2,640
    ------  ---------  -------------  ----------  -----  -----
    250 parameters (1.0 kB), 3,920 FLOPs
    """
    if depth is not None and depth < 1:
        raise ConfigError(f"summary: depth must be at least 1, or None for everything, got {depth}")
    program = trace_calls(model, xs, train=False, policy=policy)
    flow, counter = trace_flow(program), FlopCounter()
    rows = tuple(_rows(program, flow, counter, depth))
    params, state = (list(paths.leaves(tree)) for tree in program.spec)
    return Summary(
        model=model_name(model),
        inputs=describe(xs),
        output=describe(program.output),
        rows=rows,
        params=sum(param.size for _, param in params),
        state=sum(param.size for _, param in state),
        param_bytes=sum(param.nbytes for _, param in params),
        state_bytes=sum(param.nbytes for _, param in state),
        flops=counter.count(live(program.jaxpr)),
    )


def model_name(model: Callable) -> str:
    """The name of a model: that of its function, or of its layer's class."""
    while hasattr(model, "function"):
        model = model.function  # type: ignore[attr-defined]
    return getattr(model, "__name__", type(model).__name__)


def _rows(program: TracedModel, flow: Flow, counter: FlopCounter, depth: int | None) -> Iterator[Row]:
    calls = layers_by_path(program)
    variables = {(kind, path): param for kind, tree in zip(("params", "state"), program.spec, strict=True)
                 for path, param in paths.leaves(tree)}  # fmt: skip
    loose = {where for where in variables if not _in_leaf(where[1][:-1], calls)}
    shown = {path[:k] for path in calls for k in range(len(path) + 1)}
    shown |= {path[:k] for _, path in loose for k in range(len(path) + 1)}
    shown -= _corridors(shown, calls)
    shared = {path for path, readers in flow.readers().items() if len(readers) > 1}
    only_root = shown == {()}
    order = _order(flow)

    def when(path: paths.Path) -> list:
        return [(order[path[:k]], paths.order(path[k - 1])) for k in range(1, len(path) + 1)]

    for path in sorted(shown, key=when):
        if (path or only_root) and len(path) <= (depth or len(path)):
            yield _row(path, calls, variables, loose, shared, flow, counter)


def _corridors(shown: set[paths.Path], calls: LayersByPath) -> set[paths.Path]:
    """The scopes with exactly one row below them. They need no row, since the path of that row contains them."""
    inside: dict[paths.Path, int] = {}
    for path in shown:
        if path:
            inside[path[:-1]] = inside.get(path[:-1], 0) + 1
    return {path for path, n in inside.items() if path and n == 1 and path not in calls}


def _order(flow: Flow) -> dict[paths.Path, tuple[int, int]]:
    """The first use of each path, as (operation index, call number). Rows are sorted by it.

    The call number orders layers that compute nothing. Paths that only training uses come last.
    """
    at: dict[int, int] = {}  # the first operation of each call
    first: dict[paths.Path, tuple[int, int]] = {}

    def note(path: paths.Path, when: tuple[int, int]) -> None:
        for k in range(len(path) + 1):
            first[path[:k]] = min(first.get(path[:k], when), when)

    for index, operation in enumerate(flow.operations):
        for _, number in operation.within:
            at.setdefault(number, index)
        for value in operation.values:
            if value[0] in ("params", "state"):
                note(value[1:], (index, 0))
    latest = 0
    for number, call in sorted(flow.program.calls.items()):
        latest = at.get(number, latest)
        note(call.path, (latest, number))
    for tree in flow.program.spec:
        for path, _ in paths.leaves(tree):  # changes only paths without an earlier use: only training uses them
            note(path, (len(flow.operations), 0))
    return first


def _in_leaf(scope: paths.Path, calls: LayersByPath) -> bool:
    """True if a scope is in a layer that has no layers inside. Such a layer's variables have no rows of their own."""
    inside = next((scope[:k] for k in range(len(scope), -1, -1) if scope[:k] in calls), None)
    return inside is not None and inside not in calls.above


def _row(path, calls, variables: dict[Any, Param], loose, shared, flow: Flow, counter: FlopCounter) -> Row:
    below = {where: param for where, param in variables.items() if where[1][: len(path)] == path}
    own = next((where for where in loose if where[1] == path), None)  # set if the path is that of a variable
    here = calls.get(path, [])
    regions = [region for region in flow.regions.values() if region.call.path[: len(path)] == path]
    top = [r for r in regions if not any(flow.regions[i].call.path[: len(path)] == path for i in r.within)]
    named = bool(here) and path not in calls.above
    sizes = [sum(param.size for (kind, _), param in below.items() if kind == which) for which in ("params", "state")]
    if own is not None:
        label, output = "parameter" if own[0] == "params" else "state", describe(variables[own].struct)
    else:
        label, output = (layer_label(path, calls), here[0][0].output) if here else ("", "")
    return Row(
        path=paths.join(path),
        layer=label,
        output=output,
        copies=max((call.copies for chain in here for call in chain), default=1),
        calls=len(flow.outermost(path)),
        params=sizes[0],
        state=sizes[1],
        nbytes=sum(param.nbytes for param in below.values()),
        flops=sum(counter.count(r.equations) * r.times for r in top) if here or top else None,
        shared=(named or own is not None) and any(where[1] in shared for where in below),
    )
