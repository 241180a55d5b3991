"""What a drawing is made of: nodes, edges between them, and groups that hold both."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One box of a drawing.

    Attributes:
        id: unique in the drawing.
        kind: what the box stands for.
            "layer": a layer with no layers inside.
            "op": operations between layers.
            "scope": the operations of one plain function that takes a cursor and calls no layers. Also operations that
            are outside of all layers and such functions, and that use the parameters of one scope.
            "input", "output": an input or a result of the model.
            "in", "out": a port, where values enter or leave a group.
        path: the path of the layer or scope, joined by "/".
        name: the title of the box; the last name of the path for a layer.
        label: the layer with its arguments, or the operations of a scope; may be empty.
        shape: dtypes and shapes of the output.
        params: the number of parameters in it.
        copies: how many copies a stack of layers makes of it, not counting copies of the groups around it.
    """

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
    """Values that flow between two items of one group. `shape` is their dtypes and shapes.

    `source` and `target` are ids. An end at a node is the id of the node. An end at an inner group is the id of one
    of that group's ports, "GROUP|PORT".
    """

    source: str
    target: str
    shape: str


@dataclass(frozen=True)
class Group:
    """A box of nodes and groups, in program order, with the edges between them. The root has an empty name.

    An edge that enters or leaves the group ends at a port: a node of kind "in" or "out" among the group's items.

    Attributes:
        id, path, name, label, copies: as in `Node`.
        shape: dtypes and shapes of the output of the group's layer; empty for a scope.
        params: the number of parameters at and below the path.
        items: ports where values enter, nodes and groups in program order, ports where values leave.
        edges: the edges between the items.
        kind: always "group".
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
        """The items without the ports."""
        return [item for item in self.items if item.kind not in ("in", "out")]

    def groups(self) -> "Iterator[Group]":
        """All groups inside this one at any depth, outer groups first."""
        level = [self]
        while level:
            level = [item for group in level for item in group.items if isinstance(item, Group)]
            yield from level

    def nodes(self) -> Iterator[Node]:
        """All nodes inside this group at any depth, without ports."""
        for item in self.items:
            if isinstance(item, Group):
                yield from item.nodes()
            elif item.kind not in ("in", "out"):
                yield item

    def form(self) -> tuple:
        """A key that is equal for groups with equal contents; the groups' own names and paths play no part."""
        inside = [(b.name, b.form() if isinstance(b, Group) else (b.label, b.shape)) for b in self.boxes]
        return (self.label, self.shape, self.params, tuple(inside))
