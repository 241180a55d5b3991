"""`StackMapping` converts a tree that mirrors a model's parameters between its stacked and its unrolled form.

A scanned stack has one leaf for all of its blocks (layers); the unrolled model has one leaf for each block. An
optimizer that treats leaves as wholes must see the unrolled tree, while the trainer keeps the stacked one. `stacks`
finds the stacked leaves of a model. `StackMapping` matches them in any tree that mirrors the parameters, such as an
optimizer's state.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core import paths
from sapwood.core.errors import ConfigError
from sapwood.core.param import Param

Index = tuple[int, ...]
"""The index of a block in its stack, outer dimension first."""


class StackedLeaf(NamedTuple):
    """A parameter of a scanned stack.

    Args:
        path: its path in the stacked model.
        depths: for each stacked dimension, how many names of `path` come before its index in the unrolled path.
        sizes: the sizes of the stacked dimensions.
        block: the shape of one block.
    """

    path: paths.Path
    depths: tuple[int, ...]
    sizes: tuple[int, ...]
    block: tuple[int, ...]

    def unrolled(self) -> Iterator[tuple[Index, paths.Path]]:
        """The index of each block, with its path in the unrolled model."""
        for index in itertools.product(*map(range, self.sizes)):
            path = self.path
            for i, depth in reversed(list(zip(index, self.depths, strict=True))):
                path = (*path[:depth], str(i), *path[depth:])
            yield index, path


Stacks = tuple[StackedLeaf, ...]
"""The stacked parameters of a model. Hashable; the same for every tree that mirrors the parameters."""


def stacks(params: Any) -> Stacks:
    """The stacked leaves of a tree of `Param`, such as ``sw.spec(...).params``.

    >>> from sapwood.core.param import Stacked
    >>> kernel = Param((3, 4, 5), "float32", None, None, (Stacked(1, 3, "layers"),))
    >>> [(index, "/".join(path)) for index, path in stacks({"blocks": {"up": kernel}})[0].unrolled()]
    [((0,), 'blocks/0/up'), ((1,), 'blocks/1/up'), ((2,), 'blocks/2/up')]
    """
    return tuple(
        StackedLeaf(
            path,
            tuple(level.depth for level in leaf.stacked),
            tuple(level.size for level in leaf.stacked),
            tuple(leaf.shape[len(leaf.stacked) :]),
        )
        for path, leaf in paths.leaves(params)
        if isinstance(leaf, Param) and leaf.stacked
    )


@dataclass(frozen=True)
class Slot:
    """One leaf of the stacked tree, and the leaves of the unrolled tree that it consists of.

    `members` are the positions of these leaves, one for each block of `stack`, in order. They are stacked along `axis`.
    If `stack` is None, there is one member, and the leaf is the same in both trees.
    """

    members: tuple[int, ...]
    stack: StackedLeaf | None = None
    axis: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the dimensions that stacking adds; empty without a stack."""
        return () if self.stack is None else self.stack.sizes

    @property
    def indices(self) -> Iterator[Index]:
        """The block index of each member."""
        return itertools.product(*map(range, self.sizes))

    def stacked(self, parts: Sequence[Any]) -> Any:
        """Stack the blocks ``parts`` to one leaf."""
        x = jnp.stack(parts)
        return self.blocks_in_place(x.reshape(*self.sizes, *x.shape[1:]))

    def blocks_first(self, x: Any) -> Any:
        """The stacked leaf ``x`` with its stacked dimensions moved to the front."""
        return _moved(x, self.axis, 0, len(self.sizes))

    def blocks_in_place(self, x: Any) -> Any:
        """The inverse of `blocks_first`."""
        return _moved(x, 0, self.axis, len(self.sizes))


def _moved(x: Any, start: int, to: int, n: int) -> Any:
    return x if start == to else jnp.moveaxis(x, range(start, start + n), range(to, to + n))


class StackMapping:
    """The mapping between a tree that mirrors the unrolled model (parameters, optimizer state) and its stacked form.

    The leaves of the blocks of one stack become one leaf if every block has such a leaf, of the same shape and dtype.
    All other leaves stay the same. A dict mirrors the parameters if it has their paths. It may be anywhere in the tree,
    and may hold something else in place of a parameter (`optax.MaskedNode`, a tuple for each parameter).

    Args:
        tree: the unrolled tree, of arrays or of shapes.
        stacks: the stacked parameters of the model, from `stacks`.

    >>> up = StackedLeaf(("blocks", "up"), (1,), (2,), (3,))
    >>> view = StackMapping({"mu": {"blocks": {"0": {"up": np.zeros(3)}, "1": {"up": np.ones(3)}}}, "count": 0}, (up,))
    >>> view.fold(view.unfold({"mu": {"blocks": {"up": np.ones((2, 3))}}, "count": 7}))["mu"]["blocks"]["up"].shape
    (2, 3)
    """

    def __init__(self, tree: Any, stacks: Stacks):
        leaves, self.unrolled = jax.tree.flatten(tree)
        self.leaves = leaves
        numbered = jax.tree.unflatten(self.unrolled, [Slot((i,)) for i in range(len(leaves))])
        tops = {stack.path[0] for stack in stacks}
        folded = jax.tree.map(
            lambda node: _folded(node, stacks, leaves) if isinstance(node, dict) else node,
            numbered,
            is_leaf=lambda node: isinstance(node, Slot) or (isinstance(node, dict) and bool(tops & node.keys())),
        )
        self.slots, self.stacked = jax.tree.flatten(folded)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the leaves of the stacked tree."""
        shapes = [(slot, np.shape(self.leaves[slot.members[0]])) for slot in self.slots]
        return [(*shape[: slot.axis], *slot.sizes, *shape[slot.axis :]) for slot, shape in shapes]

    def scatter(self, parts: Iterable[Sequence[Any]]) -> Any:
        """The unrolled tree of ``parts``: for each leaf of the stacked tree, the sequence of its unrolled leaves."""
        out: list[Any] = [None] * len(self.leaves)
        for slot, found in zip(self.slots, parts, strict=True):
            for i, x in zip(slot.members, found, strict=True):
                out[i] = x
        return jax.tree.unflatten(self.unrolled, out)

    def structs(self, tree: Any) -> Any:
        """The unrolled tree of a stacked tree, as `jax.ShapeDtypeStruct`."""

        def block(slot: Slot, x: Any) -> jax.ShapeDtypeStruct:
            return struct(x, (*np.shape(x)[: slot.axis], *np.shape(x)[slot.axis + len(slot.sizes) :]))

        given = zip(self.slots, self.stacked.flatten_up_to(tree), strict=True)
        return self.scatter([block(slot, x)] * len(slot.members) for slot, x in given)

    def unfold(self, tree: Any) -> Any:
        """Convert a stacked tree to the unrolled tree."""

        def parts(slot: Slot, x: Any) -> Iterator[Any]:
            return iter([x]) if slot.stack is None else (slot.blocks_first(x)[index] for index in slot.indices)

        given = zip(self.slots, self.stacked.flatten_up_to(tree), strict=True)
        return self.scatter(list(parts(slot, x)) for slot, x in given)

    def fold(self, tree: Any) -> Any:
        """Convert an unrolled tree to the stacked tree."""
        given, out = self.unrolled.flatten_up_to(tree), []
        for slot in self.slots:
            parts = [given[i] for i in slot.members]
            out.append(parts[0] if slot.stack is None else slot.stacked(parts))
        return jax.tree.unflatten(self.stacked, out)


def unrolled_structs(params: Any, stacks: Stacks) -> Any:
    """The unrolled tree of stacked parameters, as `jax.ShapeDtypeStruct`.

    Frozen parameters, which ``params`` does not hold, are left out. Raises `ConfigError` if a leaf does not have the
    shape that its stack declares.
    """
    known, flat = {stack.path: stack for stack in stacks}, []
    for path, leaf in paths.leaves(params):
        if path not in known:
            flat.append((path, struct(leaf, leaf.shape)))
            continue
        stack = known[path]
        if tuple(leaf.shape) != (*stack.sizes, *stack.block):
            raise ConfigError(
                f"{paths.join(path)} is declared as {math.prod(stack.sizes)} blocks of {stack.block}, so "
                f"{(*stack.sizes, *stack.block)} in all; got {tuple(leaf.shape)}"
            )
        flat += [(name, struct(leaf, stack.block)) for _, name in stack.unrolled()]
    return paths.nest(flat)


def struct(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A `jax.ShapeDtypeStruct` of ``shape``, with the dtype and weak type of ``x``."""
    return jax.ShapeDtypeStruct(
        shape, jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, weak_type=getattr(x, "weak_type", False)
    )


def _folded(tree: dict, stacks: Stacks, leaves: list) -> dict:
    """The tree with the leaves that a stack's blocks have in common merged, each to one `Slot`.

    It is returned unchanged if a name of a block also names something else, so that merging would lose a leaf.
    """
    known = {path: (stack, index) for stack in stacks for index, path in stack.unrolled()}
    same: dict[Any, list] = {}
    flat = []
    for path, node in paths.leaves(tree):
        here = next((k for k in range(1, len(path) + 1) if path[:k] in known), None)
        if here is None:
            flat.append((path, node))
        else:
            stack, index = known[path[:here]]
            same.setdefault((stack, path[here:]), []).append((index, path, node))
    for (stack, rest), found in same.items():
        merged = _merged(stack, [node for _, _, node in sorted(found, key=lambda x: x[0])], leaves)
        if merged is None:
            flat += [(path, node) for _, path, node in found]
        else:
            flat.append(((*stack.path, *rest), merged))
    result = paths.nest(flat)
    return result if len(list(paths.leaves(result))) == len(flat) else tree  # merged paths collide


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else type(x)


def _merged(stack: StackedLeaf, nodes: list, leaves: list) -> Any:
    """The nodes of a stack's blocks merged to one node of `Slot`.

    Returns None if a block is missing, or if structures, shapes or dtypes differ.
    """
    structures = {jax.tree.structure(node) for node in nodes}
    if len(nodes) != math.prod(stack.sizes) or len(structures) != 1:
        return None
    slots = []
    for column in zip(*map(jax.tree.leaves, nodes), strict=True):
        members = tuple(slot.members[0] for slot in column)
        if len({(np.shape(leaves[i]), _dtype(leaves[i])) for i in members}) != 1:
            return None
        shape = np.shape(leaves[members[0]])
        # An optimizer's history has a dimension before those of the parameter; it stays in front of the stacked ones.
        extra = len(shape) - len(stack.block)
        slots.append(Slot(members, stack, extra if extra > 0 and shape[extra:] == stack.block else 0))
    return jax.tree.unflatten(structures.pop(), slots)
