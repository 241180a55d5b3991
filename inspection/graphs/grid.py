"""The layout of a group: a row and a column for each box, and a lane for each edge that passes rows.

Rows follow the longest path, as in Sugiyama, Tagawa and Toda 1981, "Methods for Visual Understanding of Hierarchical
System Structures". The longest chain of boxes is in column 0, so it is drawn straight. Every other chain gets the
nearest free column. The layout does not depend on the sizes of boxes, so it stays valid while groups open and close.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sapwood.inspection.graphs.boxes import Edge, Group

_TRACK = 1 / 16
"""The distance between two lanes as a fraction of a column. Lanes lie between the columns of boxes."""


@dataclass(frozen=True)
class Lane:
    """The column in which an edge passes the rows ``first`` to ``last``."""

    column: float
    first: int
    last: int


@dataclass
class Grid:
    """The layout of one group. Boxes are named by their ids.

    Attributes:
        rows: the row of each box, from 0 at the top.
        columns: the column of each box; 0 is the middle, negative columns are to the left.
        lanes: the lane of each edge that passes rows.
        edges: the edges of the group.
        bends: the heights at which an edge turns in the gap below its source's row and in the gap above its target's
            row, as fractions of the gap from its top.
    """

    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)
    lanes: dict[Edge, Lane] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    bends: dict[Edge, tuple[float, float]] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """The number of rows."""
        return 1 + max(self.rows.values(), default=-1)

    @property
    def tracks(self) -> list[float]:
        """All columns from left to right. Each fractional one has a mirror column, so column 0 stays in the middle."""
        used = {*self.columns.values(), *(lane.column for lane in self.lanes.values()), 0.0}
        return sorted(used | {-c for c in used if c != round(c)})


def grid(group: Group) -> Grid:
    """The layout of a group's own items. An edge to a port of a nested group counts as an edge to that group."""
    placed = Grid(edges=list(group.edges))
    order = {item.id: k for k, item in enumerate(group.items)}
    ends = [(item_of(edge.source, group), item_of(edge.target, group)) for edge in group.edges]
    forward = sorted({(order[a], order[b]) for a, b in ends if order[a] < order[b]})
    rows = _rows(group, forward)
    columns = _Columns(rows, forward, [item.kind in ("in", "out") for item in group.items])
    for item in group.items:
        placed.rows[item.id] = rows[order[item.id]]
        placed.columns[item.id] = columns.of[order[item.id]]
    lengths = [(abs(placed.rows[b] - placed.rows[a]), k) for k, (a, b) in enumerate(ends)]
    for _, k in sorted(lengths):
        a, b = ends[k]
        first, last = placed.rows[a] + 1, placed.rows[b] - 1
        if a == b or last < first - 1:  # the edge leads upwards: the program enters a scope twice
            first, last = sorted((placed.rows[a], placed.rows[b]))
        if first <= last:
            column = columns.lane(order[a], columns.of[order[a]], columns.of[order[b]], first, last)
            placed.lanes[group.edges[k]] = Lane(column, first, last)
    _bend(placed, group)
    return placed


def _bend(placed: Grid, group: Group) -> None:
    """Choose the heights at which edges turn. They differ by source, so lines of different sources do not overlap."""
    gaps: dict[int, list[str]] = defaultdict(list)  # row -> the sources of the edges that turn below it
    for edge in placed.edges:
        a, b = item_of(edge.source, group), item_of(edge.target, group)
        straight = (a, b) == (edge.source, edge.target) and placed.columns[a] == placed.columns[b]
        if edge in placed.lanes or not straight:
            for row in {placed.rows[a], placed.rows[b] - 1}:
                if edge.source not in gaps[row]:
                    gaps[row].append(edge.source)

    def height(row: int, source: str) -> float:
        sources = gaps[row]
        return 0.42 if source not in sources else 0.42 + 0.36 * ((sources.index(source) + 0.5) / len(sources) - 0.5)

    for edge in placed.edges:
        a, b = item_of(edge.source, group), item_of(edge.target, group)
        placed.bends[edge] = (height(placed.rows[a], edge.source), height(placed.rows[b] - 1, edge.source))


def item_of(end: str, group: Group) -> str:
    """The id of the group's item at an end of an edge; for a port of a nested group, that nested group."""
    owner, _, port = end.partition("|")
    return end if not port or owner == group.id else owner


def _rows(group: Group, forward: Iterable[tuple[int, int]]) -> list[int]:
    """The row of each item: one below the lowest item that it reads from. Outputs and "out" ports come last."""
    before, after = _neighbours(forward)
    rows = [0] * len(group.items)
    inlets = any(item.kind in ("in", "input") for item in group.items)
    for k, item in enumerate(group.items):
        rows[k] = max((rows[j] + 1 for j in before[k]), default=int(inlets and item.kind not in ("in", "input")))
    for k in reversed(range(len(rows))):  # an item that reads nothing moves to the row above its first reader
        if not before[k] and after[k] and group.items[k].kind not in ("in", "input"):
            rows[k] = max(rows[k], min(rows[j] for j in after[k]) - 1)
    inside = [row for row, item in zip(rows, group.items, strict=True) if item.kind not in ("out", "output")]
    last = max(inside, default=0)
    for k, item in enumerate(group.items):
        if item.kind in ("out", "output"):
            rows[k] = last + 1
    return rows


def _neighbours(forward: Iterable[tuple[int, int]]) -> tuple[dict, dict]:
    before, after = defaultdict(list), defaultdict(list)
    for a, b in forward:
        before[b].append(a)
        after[a].append(b)
    return before, after


class _Columns:
    """Assigns columns to items and edges.

    `of` is the column of each item. `taken` holds, for each column, (first row, last row, source) of what is in it. The
    source of a box is its own index.
    """

    def __init__(self, rows: list[int], forward: list[tuple[int, int]], ports: list[bool]):
        self.rows = rows
        self.before, self.after = _neighbours(forward)
        self.taken: dict[float, list[tuple[int, int, int]]] = defaultdict(list)
        self.of: dict[int, float] = {}
        for k in self._longest():
            self._put(k, 0.0)
        for k in sorted(range(len(rows)), key=lambda k: (ports[k], rows[k], k)):
            if k not in self.of:
                self._chain(k)

    def _put(self, k: int, column: float) -> None:
        self.of[k] = column
        self.taken[column].append((self.rows[k], self.rows[k], k))

    def _longest(self) -> list[int]:
        """The indices of the longest chain of items, first to last."""
        length: dict[int, int] = {}
        back: dict[int, int | None] = {}
        for k in range(len(self.rows)):
            before = back[k] = max(self.before[k], key=lambda j: (length[j], -j), default=None)
            length[k] = 1 if before is None else 1 + length[before]
        k = max(length, key=lambda j: (length[j], -j), default=None)
        chain = []
        while k is not None:
            chain.append(k)
            k = back[k]
        return chain[::-1]

    def _chain(self, k: int) -> None:
        """Place an item and the items that follow it row by row in one column, near the items that they connect to."""
        chain = [k]
        while True:
            follow = [j for j in self.after[chain[-1]] if j not in self.of and self.rows[j] == self.rows[chain[-1]] + 1]
            if not follow:
                break
            chain.append(follow[0])
        near = [self.of[j] for j in (*self.before[k], *self.after[chain[-1]]) if j in self.of]
        middle = sum(near) / len(near) if near else 0.0
        first, last = self.rows[chain[0]], self.rows[chain[-1]]
        column = min(
            (c for c in range(-len(self.rows), len(self.rows) + 1) if self._free(c, first, last, -1)),
            key=lambda c: (abs(c - middle), abs(c), -c),
        )
        for j in chain:
            self._put(j, float(column))

    def _free(self, column: float, first: int, last: int, source: int) -> bool:
        return all(last < a or first > b or by == source for a, b, by in self.taken[column])

    def lane(self, source: int, start: float, end: float, first: int, last: int) -> float:
        """The column for an edge through the rows ``first`` to ``last``. Edges from one source may share a column."""
        key = -2 - source  # differs from the index of every item
        outer = max(start, end, key=abs)
        side = -1 if outer < 0 else 1
        tracks = (outer + side * k * _TRACK for k in range(1, 8))
        further = (outer + side * (k + 0.5) for k in range(1, len(self.rows) + 100))
        candidates = (outer, min(start, end, key=abs), *tracks, *further)
        column = next(c for c in candidates if self._free(c, first, last, key))
        self.taken[column].append((first, last, key))
        return column
