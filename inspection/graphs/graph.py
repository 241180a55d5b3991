"""`graph`: a model drawn by layer path, in groups that open and close.

`graph` traces the model in train mode and builds the groups (`build`). It also chooses the groups that are open at
first. A `Graph` is written by `svg` or `html`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.inspection.data_flow import trace_flow
from sapwood.inspection.graphs.boxes import Group
from sapwood.inspection.layer_calls import trace_calls


@dataclass(frozen=True)
class Graph:
    """The drawing of a model: `svg()` gives a static picture, `html()` a page whose groups open and close.

    `model` is the model's name, `root` the outermost group, and `opened` holds the ids of the groups that are open at
    first.
    """

    model: str
    root: Group
    opened: frozenset[str]

    def svg(self) -> str:
        """The drawing as an SVG document, with the groups in `opened` open."""
        from sapwood.inspection.graphs.svg import svg

        return svg(self)

    def html(self) -> str:
        """The drawing as one HTML page that loads no other files. A click opens or closes a group."""
        from sapwood.inspection.graphs.html_page import html

        return html(self)

    def save(self, file: Any) -> None:
        """Write the drawing to a file named `.svg` or `.html`. Raises `ConfigError` for another suffix."""
        file = Path(file).expanduser()
        if file.suffix not in (".svg", ".html"):
            raise ConfigError(f"graph: a drawing is written as .svg or .html, not {file.name!r}")
        file.write_text(self.svg() if file.suffix == ".svg" else self.html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        from sapwood.inspection.graphs.html_page import frame

        return frame(self)

    def __repr__(self) -> str:
        nodes, groups = sum(1 for _ in self.root.nodes()), sum(1 for _ in self.root.groups())
        return f"Graph({self.model}: {nodes} nodes in {groups} groups; .svg(), .html() or .save(file) draws it)"


def graph(model: Callable, *xs: Any, policy: Any = None, limit: int = 40) -> Graph:
    """Draw ``model(v, *xs)``: a box for each layer, groups by path, and edges along which values flow.

    Nothing is computed. The edges are those of the program traced in train mode. Operations between layers are small
    boxes with the names of the operations; an array function such as `L.max_pool` is one operation. A plain function
    that takes a cursor, ``block(v.blocks[i], x)``, is a group with all that it computes.

    Args:
        model: a layer or a function of a cursor and ``xs``.
        xs: arrays or `jax.ShapeDtypeStruct`, in any pytree.
        policy: the precision policy; None for the default.
        limit: the largest number of boxes shown at first, at least 1. All groups are open if that shows at most
            ``limit`` boxes. Otherwise as many groups are open as fit, and of equal groups only the first.

    Raises:
        ConfigError: ``limit`` is below 1. Errors of `sw.spec` are raised too.

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
    from sapwood.inspection.graphs.build import build
    from sapwood.inspection.summaries.summary import model_name

    if limit < 1:
        raise ConfigError(f"graph: limit must be at least 1 box, got {limit}")
    root = build(trace_flow(trace_calls(model, xs, train=True, policy=policy, watch=True)))
    return Graph(model_name(model), root, frozenset(_opened(root, limit)))


def _opened(root: Group, limit: int) -> Iterator[str]:
    """The ids of the groups that are open at first."""
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
