"""Where things stand in a group: a row and a column for each box, and a lane for each edge that passes rows.

Rows are those of the longest path, as in Sugiyama, Tagawa and Toda 1981, "Methods for Visual Understanding of
Hierarchical System Structures". The longest chain of boxes is column 0, so that it stays straight; what runs beside it
gets the nearest column that is free. Sizes play no part, so the same grid holds while groups open and close.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from sapwood.inspection.graphs.boxes import Edge, Group

_TRACK = 1 / 16
"""Lanes for edges lie between the columns of boxes, in fractions of a column."""


@dataclass(frozen=True)
class Lane:
    """The way of an edge through the rows ``first`` to ``last``."""

    column: float
    first: int
    last: int


@dataclass
class Grid:
    """Rows and columns of the boxes of one group, and lanes of its edges."""

    rows: dict[str, int] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)
    lanes: dict[Edge, Lane] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    bends: dict[Edge, tuple[float, float]] = field(default_factory=dict)
    """How far down the gap between two rows an edge turns, leaving its source and reaching its target."""

    @property
    def height(self) -> int:
        """How many rows there are."""
        return 1 + max(self.rows.values(), default=-1)

    @property
    def tracks(self) -> list[float]:
        """All columns from left to right; a lane beside the middle has a twin on the other side, to keep it there."""
        used = {*self.columns.values(), *(lane.column for lane in self.lanes.values()), 0.0}
        return sorted(used | {-c for c in used if c != round(c)})


def grid(group: Group) -> Grid:
    """The grid of a group's own items; edges into a group count for the group."""
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
        if a == b or last < first - 1:  # against the current: a scope that is entered twice
            first, last = sorted((placed.rows[a], placed.rows[b]))
        if first <= last:
            column = columns.lane(order[a], columns.of[order[a]], columns.of[order[b]], first, last)
            placed.lanes[group.edges[k]] = Lane(column, first, last)
    _bend(placed, group)
    return placed


def _bend(placed: Grid, group: Group) -> None:
    """Let the edges of different sources turn at different heights, so that their lines do not run into each other."""
    gaps: dict[int, list[str]] = defaultdict(list)  # below this row: the ends that lines come from
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
    """The item of a group at an end of an edge, which may be a place of entry or exit of a group in it."""
    owner, _, port = end.partition("|")
    return end if not port or owner == group.id else owner


def _rows(group: Group, forward: Iterable[tuple[int, int]]) -> list[int]:
    """The row of each item: one below everything it reads from; places of exit last."""
    before, after = _neighbours(forward)
    rows = [0] * len(group.items)
    inlets = any(item.kind in ("in", "input") for item in group.items)
    for k, item in enumerate(group.items):
        rows[k] = max((rows[j] + 1 for j in before[k]), default=int(inlets and item.kind not in ("in", "input")))
    for k in reversed(range(len(rows))):  # what reads nothing stands just above its reader
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
    """Hands out columns: what is taken, from which row to which, and by which source."""

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
        """The longest chain of items."""
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
        """Place an item, and what follows it row by row, in one column."""
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
        """A way down for an edge; edges from one source share theirs."""
        key = -2 - source  # no item's own place
        outer = max(start, end, key=abs)
        side = -1 if outer < 0 else 1
        tracks = (outer + side * k * _TRACK for k in range(1, 8))
        further = (outer + side * (k + 0.5) for k in range(1, len(self.rows) + 100))
        candidates = (outer, min(start, end, key=abs), *tracks, *further)
        column = next(c for c in candidates if self._free(c, first, last, key))
        self.taken[column].append((first, last, key))
        return column
