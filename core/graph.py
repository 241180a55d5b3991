"""`graph`: a model drawn by layer path, in groups that open and close."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood.core.calls import trace_calls
from sapwood.core.errors import ConfigError
from sapwood.core.flow import trace_flow


@dataclass(frozen=True)
class Node:
    """One box. `kind` is "layer", "op" (what a model computes between its layers), "scope" (what a plain function
    computes with a cursor and no layers, or what is computed outside of any with the parameters of a scope), "input",
    "output", or "in" and "out", the places where values enter and leave a group."""

    id: str
    kind: str
    path: str
    name: str
    label: str
    shape: str
    params: int
    copies: int


@dataclass(frozen=True)
class Edge:
    """Values that flow from one node or group to another one beside it; `shape` is what they are."""

    source: str
    target: str
    shape: str


@dataclass(frozen=True)
class Group:
    """A box of nodes and groups, in the order of the program, with the edges between them. The root has no name.

    An edge that comes from outside or goes there ends at a node of kind "in" or "out" in the group itself.
    """

    id: str
    path: str
    name: str
    label: str
    shape: str
    params: int
    copies: int
    items: "tuple[Node | Group, ...]"
    edges: tuple[Edge, ...]
    kind: str = "group"

    @property
    def boxes(self) -> "list[Node | Group]":
        """What stands in it, without the places where values enter and leave."""
        return [item for item in self.items if item.kind not in ("in", "out")]

    def groups(self) -> "Iterator[Group]":
        """All groups below this one, outer ones first."""
        level = [self]
        while level:
            level = [item for group in level for item in group.items if isinstance(item, Group)]
            yield from level

    def nodes(self) -> Iterator[Node]:
        """All nodes in it, however deep."""
        for item in self.items:
            if isinstance(item, Group):
                yield from item.nodes()
            elif item.kind not in ("in", "out"):
                yield item

    def form(self) -> tuple:
        """What makes two groups alike: what stands in them, not where they stand."""
        inside = [(b.name, b.form() if isinstance(b, Group) else (b.label, b.shape)) for b in self.boxes]
        return (self.label, self.shape, self.params, tuple(inside))


@dataclass(frozen=True)
class Graph:
    """The drawing of a model: `svg()` is a still picture, `html()` a page whose groups open and close."""

    model: str
    root: Group
    opened: frozenset[str]

    def svg(self) -> str:
        """The drawing as an SVG document, with the groups in `opened` open."""
        from sapwood.core.graph_svg import svg

        return svg(self)

    def html(self) -> str:
        """The drawing as one HTML page that needs nothing else: a click opens or closes a group."""
        from sapwood.core.graph_html import html

        return html(self)

    def save(self, file: Any) -> None:
        """Write the drawing where the name ends in `.svg` or `.html`. Raises `ConfigError` for another ending."""
        file = Path(file).expanduser()
        if file.suffix not in (".svg", ".html"):
            raise ConfigError(f"graph: a drawing is written as .svg or .html, not {file.name!r}")
        file.write_text(self.svg() if file.suffix == ".svg" else self.html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        from sapwood.core.graph_html import frame

        return frame(self)

    def __repr__(self) -> str:
        nodes, groups = sum(1 for _ in self.root.nodes()), sum(1 for _ in self.root.groups())
        return f"Graph({self.model}: {nodes} nodes in {groups} groups; .svg(), .html() or .save(file) draws it)"


def graph(model: Callable, *xs: Any, policy=None, limit: int = 40) -> Graph:
    """Draw ``model(v, *xs)``: a box for each layer, groups by path, and edges along which values flow.

    ``xs`` are arrays or `jax.ShapeDtypeStruct`, in any pytree; nothing is computed. The edges are those of the traced
    program in train mode. What a model computes between its layers is drawn as small boxes that name the operations, a
    function of arrays such as `L.max_pool` as one. A plain function that takes a cursor, ``block(v.blocks[i], x)``, is
    a group with all that it computes.
    All groups are open where that makes at most ``limit`` boxes; otherwise as many as fit, and only the first one of
    groups that are alike. Raises `ConfigError` for a limit below 1, and what `sw.spec` raises.

    >>> import jax, jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> def model(v, x):
    ...     return L.Dense(10)(v.logits, jax.nn.relu(L.Dense(16)(v.hidden, x)))
    >>> drawing = graph(model, jnp.ones((8, 4)))
    >>> drawing
    Graph(model: 5 nodes in 0 groups; .svg(), .html() or .save(file) draws it)
    >>> [node.name for node in drawing.root.nodes()]
    ['x', 'hidden', 'relu', 'logits', 'output']
    >>> drawing.svg()[:4]
    '<svg'
    """
    from sapwood.core.graph_nodes import build
    from sapwood.core.summary import model_name

    if limit < 1:
        raise ConfigError(f"graph: limit must be at least 1 box, got {limit}")
    root = build(trace_flow(trace_calls(model, xs, train=True, policy=policy, watch=True)))
    return Graph(model_name(model), root, frozenset(_opened(root, limit)))


def _opened(root: Group, limit: int) -> Iterator[str]:
    """The groups that are open at first."""
    fits = sum(1 for _ in root.nodes()) <= limit
    shown, seen, visible = len(root.boxes), set(), {root.id}
    parents = {item.id: group.id for group in [root, *root.groups()] for item in group.items}
    for group in root.groups():
        if parents[group.id] not in visible:
            continue
        more = len(group.boxes) - 1
        if fits or (shown + more <= limit and group.form() not in seen):
            seen.add(group.form())
            visible.add(group.id)
            shown += more
            yield group.id
