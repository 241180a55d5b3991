"""What a drawing is made of: nodes, edges between them, and groups that hold both."""

from collections.abc import Iterator
from dataclasses import dataclass


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
