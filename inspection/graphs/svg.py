"""A drawing as one SVG document that loads no other files.

`_layout` computes sizes from the inside out, from estimated widths of texts. `_Painter` then writes boxes and edges.
`html` has the same geometry of edges in JavaScript: change both.
"""

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from sapwood.inspection.graphs.boxes import Edge, Group, Node
from sapwood.inspection.graphs.grid import Grid, grid, item_of
from sapwood.inspection.graphs.look import GAP_X, GAP_Y, LANE, PAD, hues, layer_class, legend, lines, tooltip
from sapwood.inspection.page import FONT

if TYPE_CHECKING:
    from sapwood.inspection.graphs.graph import Graph

_STYLE = f"""
text {{ font-family: {FONT}; font-size: 11px; fill: #55606b; text-anchor: middle }}
.name {{ font-size: 13px; font-weight: 600; fill: #1d2733 }}
.left {{ text-anchor: start }}
.box {{ stroke-width: 1.2 }}
.op {{ fill: #f1f3f5; stroke: #c9d0d7 }}
.end {{ fill: #2f3b48; stroke: #2f3b48 }}
.end-name {{ fill: #fff }} .end-line {{ fill: #c8d2dc }}
.group {{ fill: #f4f6f8; stroke: #a9b4bf; stroke-width: 1.2 }}
.closed {{ fill: #fff; stroke: #8b98a5; stroke-width: 1.2 }}
.edge {{ fill: none; stroke: #7d8a97; stroke-width: 1.4 }}
.dot {{ fill: #7d8a97 }}
""".strip()


@dataclass
class _Box:
    """An item and its size in pixels.

    `x` is its middle and `y` its top, both relative to the group around it. `header` is the height of an open group's
    title, and `inner` its contents.
    """

    item: Node | Group
    width: float
    height: float
    x: float = 0
    y: float = 0
    header: float = 0
    inner: "_Inner | None" = None


@dataclass
class _Inner:
    """The contents of an open group in pixels, relative to their top left corner.

    `tracks` maps a column of the grid to its middle. `rows` holds the top and bottom of each row.
    """

    grid: Grid
    boxes: dict[str, _Box]
    tracks: dict[float, float] = field(default_factory=dict)
    rows: list[tuple[float, float]] = field(default_factory=list)
    width: float = 0
    height: float = 0

    @property
    def middle(self) -> float:
        """The x of column 0, the main chain. A group is symmetric around it, so the chains of nested groups align."""
        return self.tracks[0.0]

    @property
    def reach(self) -> float:
        """The larger distance from the middle to the left or right border of the contents."""
        return max(self.middle, self.width - self.middle)


def svg(graph: "Graph") -> str:
    """The drawing with the groups in ``graph.opened`` open."""
    inner = _layout(graph.root, graph)
    parts = _Painter(graph).contents(graph.root, inner, PAD, PAD, 0, inner.height + 2 * PAD)
    width, height = inner.width + 2 * PAD, inner.height + 2 * PAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img"><title>{legend(graph)}</title><style>{_STYLE}</style>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="90">'
        '<path d="M0,0.8 L7.5,4 L0,7.2 z" fill="#7d8a97"/></marker></defs>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _measure(text: str, size: float) -> float:
    """The approximate width of a text in pixels; ``size`` is the font size."""
    return sum(0.34 if c in "ijl.,:;'|[]()·f t" else 0.86 if c in "mwMW×…" else 0.6 for c in text) * size


def _box(item: Node | Group, graph: "Graph") -> _Box:
    if item.kind in ("in", "out"):
        return _Box(item, 8, 0)
    said = lines(item)
    text = max([_measure(item.name, 13.5), *(_measure(line, 11) for line in said)])
    if not isinstance(item, Group):
        return _Box(item, max(text + 26, 64), 16 * (1 + len(said)) + (10 if item.kind == "op" else 16))
    if item.id not in graph.opened:
        return _Box(item, text + 46, 16 * (1 + len(said)) + 22)
    inner = _layout(item, graph)
    header = 14 + 15 * (1 + len(said))
    width = max(2 * inner.reach + 2 * PAD, 2 * text + 56)
    return _Box(item, width, inner.height + header + PAD, header=header, inner=inner)


def _layout(group: Group, graph: "Graph") -> _Inner:
    """Place the boxes of a group. A column is as wide as its widest box, a row as high as its highest."""
    inner = _Inner(grid(group), {item.id: _box(item, graph) for item in group.items})
    widths = dict.fromkeys(inner.grid.tracks, LANE * 1.0)
    heights = [0.0] * inner.grid.height
    for name, box in inner.boxes.items():
        column, row = inner.grid.columns[name], inner.grid.rows[name]
        widths[column] = max(widths[column], box.width)
        heights[row] = max(heights[row], box.height)
    at = 0.0
    for column in inner.grid.tracks:
        inner.tracks[column] = at + widths[column] / 2
        at += widths[column] + GAP_X
    inner.width = at - GAP_X
    at = 0.0
    for height in heights:
        inner.rows.append((at, at + height))
        at += height + GAP_Y
    inner.height = at - GAP_Y
    for name, box in inner.boxes.items():
        top, bottom = inner.rows[inner.grid.rows[name]]
        box.x, box.y = inner.tracks[inner.grid.columns[name]], (top + bottom - box.height) / 2
    return inner


class _Painter:
    """Writes boxes and edges as SVG elements."""

    def __init__(self, graph: "Graph"):
        self.graph, self.hues = graph, hues(graph)

    def contents(self, group: Group, inner: _Inner, x: float, y: float, top: float, bottom: float) -> list[str]:
        """The items of a group whose contents begin at (x, y), and whose border is at ``top`` and ``bottom``."""
        parts = [self._edge(group, edge, inner, x, y, top, bottom) for edge in inner.grid.edges]
        for box in inner.boxes.values():
            if box.item.kind in ("in", "out"):
                cy = top if box.item.kind == "in" else bottom
                parts.append(f'<circle class="dot" cx="{x + box.x:.1f}" cy="{cy:.1f}" r="2.6"/>')
            else:
                parts += self._item(box, x, y)
        return parts

    def _item(self, box: _Box, x: float, y: float) -> list[str]:
        item, left, top = box.item, x + box.x - box.width / 2, y + box.y
        parts = [f"<g><title>{escape(tooltip(item))}</title>"]
        if box.inner is not None:
            assert isinstance(item, Group)
            if item.copies > 1:
                parts.append(_rect("group shade", left + 5, top + 5, box, 10))
            parts.append(_rect("group", left, top, box, 10))
            parts += _text(item, left + 14, top + 21, "left")
            parts.append("</g>")
            start = x + box.x - box.inner.middle
            return parts + self.contents(item, box.inner, start, top + box.header, top, top + box.height)
        style, kind, radius = "", "box", 7.0
        if isinstance(item, Group):
            parts.append(_rect("closed shade", left + 4, top + 4, box, 9) + _rect("closed", left, top, box, 9))
        else:
            if item.kind == "op":
                kind, radius = "op", box.height / 2
            elif item.kind in ("input", "output"):
                kind, radius = "end", 12.0
            else:
                hue = self.hues[layer_class(item)]
                style = f' style="fill:hsl({hue} 62% 95%);stroke:hsl({hue} 38% 62%)"'
            parts.append(_rect(kind, left, top, box, radius, style))
        height = 16 * len(lines(item))
        parts += _text(item, x + box.x, top + (box.height - height) / 2 + 4.5, "end" if kind == "end" else "")
        return [*parts, "</g>"]

    def _edge(self, group: Group, edge: Edge, inner: _Inner, x: float, y: float, top: float, bottom: float) -> str:
        """A line from the bottom of one box to the top of another: vertical beside rows, with bends between rows."""
        x1, y1, row1 = self._end(group, edge.source, inner, x, y, top)
        x2, y2, row2 = self._end(group, edge.target, inner, x, y, bottom)
        if item_of(edge.source, group) != edge.source or inner.boxes[edge.source].item.kind != "in":
            y1 += inner.boxes[item_of(edge.source, group)].height
        down, into = y + inner.rows[row1][1], y + inner.rows[row2][0]
        way, lane = f"M{x1:.1f},{y1:.1f}", inner.grid.lanes.get(edge)
        bends = inner.grid.bends[edge]
        if lane is None:
            way += _bend(x1, down, x2, into, bends[0])
        else:
            middle = x + inner.tracks[lane.column]
            first, last = y + inner.rows[lane.first][0], y + inner.rows[lane.last][1]
            if row2 > row1:
                way += _bend(x1, down, middle, first, bends[0]) + _bend(middle, last, x2, into, bends[1])
            else:
                way += _back(x1, down, middle, x2, into)
        tip = ' marker-end="url(#tip)"' if inner.boxes[item_of(edge.target, group)].item.kind != "out" else ""
        way += f" V{y2:.1f}" if abs(y2 - into) > 0.05 else ""
        return f'<path class="edge" d="{way}"{tip}><title>{escape(edge.shape)}</title></path>'

    def _end(self, group: Group, end: str, inner: _Inner, x: float, y: float, border: float):
        """The x of an edge's end, the top of its box, and its row. A port is at the group's ``border``."""
        owner = item_of(end, group)
        box = inner.boxes[owner]
        row = inner.grid.rows[owner]
        if box.item.kind in ("in", "out"):
            return x + box.x, border, row
        if box.inner is not None and end in box.inner.boxes:  # a port of an open group
            return x + box.x - box.inner.middle + box.inner.boxes[end].x, y + box.y, row
        return x + box.x, y + box.y, row


def _bend(x1: float, y1: float, x2: float, y2: float, where: float) -> str:
    """A path down from (x1, y1), across with round corners, and down to (x2, y2).

    ``where`` is the height of the crossing as a fraction of the way from y1 to y2.
    """
    across = x2 - x1
    if abs(across) < 0.5:
        return f" V{y2:.1f}"
    middle = y1 + where * (y2 - y1)
    r = min(8.0, abs(middle - y1), abs(across) / 2)
    side, turn = (r if across > 0 else -r), (r if y2 > y1 else -r)
    return (
        f" V{middle - turn:.1f} q0,{turn:.1f} {side:.1f},{turn:.1f} H{x2 - side:.1f} "
        f"q{side:.1f},0 {side:.1f},{turn:.1f} V{y2:.1f}"
    )


def _back(x1: float, y1: float, middle: float, x2: float, y2: float) -> str:
    """A path of an upward edge: out below (x1, y1), up at x ``middle``, and into (x2, y2) from above."""
    r, out, home = GAP_Y / 4, 1 if middle > x1 else -1, 1 if x2 > middle else -1
    turns = [f"q0,{r} {out * r},{r} H{middle - out * r:.1f} q{out * r},0 {out * r},{-r}"]
    turns.append(f"V{y2 - r:.1f} q0,{-r} {home * r},{-r} H{x2 - home * r:.1f} q{home * r},0 {home * r},{r}")
    return f" V{y1 + r:.1f} {' '.join(turns)} V{y2:.1f}"


def _rect(kind: str, left: float, top: float, box: _Box, radius: float, style: str = "") -> str:
    return (
        f'<rect class="box {kind}" x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'rx="{radius:.0f}"{style}/>'
    )


def _text(item: Node | Group, x: float, y: float, kind: str) -> list[str]:
    name, line = ("name end-name", "end-line") if kind == "end" else (f"name {kind}", kind)
    small = ' style="font-weight:500;font-size:11.5px"' if item.kind == "op" else ""
    parts = [f'<text class="{name}" x="{x:.1f}" y="{y:.1f}"{small}>{escape(item.name)}</text>']
    for k, said in enumerate(lines(item)):
        parts.append(f'<text class="{line}" x="{x:.1f}" y="{y + 16 * (k + 1):.1f}">{escape(said)}</text>')
    return parts
