"""A pipeline: stages that each hold a part of a stack, work at the same time, and hand micro-batches on.

Everything is one `jax.shard_map` over the mesh axis of the stages alone, so that other axes shard inside a stage as
they do elsewhere. A loop over the ticks of a `Timetable` has a stage work on a micro-batch and send what comes out to
the next one. Its gradient by JAX is the pipeline backwards, with the memory of GPipe; with a timetable that has a
backward pass of its own, it is that one.

Inputs and outputs lie spread over the stages, an equal share of the micro-batches on each, and stream: with every
micro-batch that the first stage takes, those of its slot move one stage towards it. So no stage ever holds them all,
and nothing is gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.scan import scan
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.pipeline.timetable import Timetable


class Work(NamedTuple):
    """What a pipeline does.

    Attributes:
        enter: `(leaves, microbatch) -> v`: the variables of one piece of the stack, from the leaves of that piece.
        piece: `(v, x, riders, shared) -> (y, found)`: what a piece makes of a micro-batch, and what it reports.
        timetable: which stage does what when.
        mesh, axis: the mesh, and the axis of the stages.
    """

    enter: Callable[[list, jax.Array], Any]
    piece: Callable[..., tuple[Any, Any]]
    timetable: Timetable
    mesh: AnyMesh
    axis: str

    @property
    def stages(self) -> int:
        return self.timetable.stages

    @property
    def rounds(self) -> int:
        return int(self.timetable.round.max()) + 1


def run(work: Work, leaves: Sequence[jax.Array], x: Any, riders: Any, shared: Any) -> tuple[Any, Any]:
    """The stack applied to the micro-batches of x, and what its pieces found, `(stages, rounds, micro-batches, ...)`.

    `leaves` have the blocks of the stack as their first dimension. x and `riders`, which each micro-batch takes along,
    are as `cut` gives them; so is the result. `shared` is the same for all.
    """
    held, ends = PartitionSpec(work.axis), (PartitionSpec(work.axis), PartitionSpec(work.axis))

    def local(leaves, waiting, shared):
        pieces = [_pieces(work, leaf) for leaf in leaves]
        one = _forward if work.timetable.backward is None else _forward_then_backward
        return jax.tree.map(lambda a: a[None], one(work, pieces, jax.tree.map(lambda a: a[0], waiting), shared))

    # What is tiny or no number, such as keys, every stage has whole.
    specs = [held if _floating(leaf) else PartitionSpec() for leaf in leaves]
    on_stages = jax.shard_map(
        local, mesh=work.mesh, in_specs=(specs, held, PartitionSpec()), out_specs=ends, axis_names={work.axis},
        check_vma=False,
    )  # fmt: skip
    compiled = jax.jit(on_stages)  # other axes are the compiler's, so it must compile
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        compiled = functools.partial(_compiled, compiled)
    return compiled(list(leaves), (x, riders), shared)


def _compiled(f: Callable, *given: Any) -> Any:
    """f(*given) as a program, and its gradient as one, where all else runs as plain Python."""

    def forward(*given: Any) -> Any:
        with jax.disable_jit(False):
            return jax.vjp(f, *given)

    def backward(pull: Callable, slopes: Any) -> Any:
        with jax.disable_jit(False):
            return pull(slopes)

    apart = jax.custom_vjp(lambda *given: forward(*given)[0])
    apart.defvjp(forward, backward)
    return apart(*given)


# ---- how a batch lies ------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a batch is cut into micro-batches: strided, so that every device keeps its rows.

    Attributes:
        mesh, axis: the mesh, and the axis of the stages.
        names: the mesh axes that the batch is split over, that of the stages among them.
        microbatches: how many.
    """

    mesh: AnyMesh
    axis: str
    names: tuple[str, ...]
    microbatches: int

    def enter(self, x: jax.Array) -> jax.Array:
        """`(batch, ...)` to `(stages, micro-batches / stages, rows, ...)`."""
        sizes, split, merged = self._layout(x.shape[0])
        x = self._lie(x.reshape(*sizes, *x.shape[1:]), split)
        return self._lie(_merged(x.transpose(1, 3, 0, 2, 4, *range(5, x.ndim)), 2, 3), merged)

    def leave(self, x: jax.Array) -> jax.Array:
        """The inverse of `enter`."""
        batch = math.prod(x.shape[:3])
        (a, s, c, q, rows), split, merged = self._layout(batch)
        x = self._lie(x, merged).reshape(s, q, a, c, rows, *x.shape[3:])
        x = self._lie(x.transpose(2, 0, 3, 1, 4, *range(5, x.ndim)), split)
        return self._lie(_merged(x, 0, 5), (self.names,))

    def _layout(self, batch: int) -> tuple[tuple[int, ...], tuple, tuple]:
        at, size = self.names.index(self.axis), self.mesh.shape
        before, after = self.names[:at], self.names[at + 1 :]
        a, c = (math.prod(size[name] for name in names) for names in (before, after))
        s = size[self.axis]
        q = self.microbatches // s
        sizes = (a, s, c, q, batch // (a * c * self.microbatches))
        return sizes, (before, self.axis, after), (self.axis, None, before + after)

    def _lie(self, x: jax.Array, names: tuple) -> jax.Array:
        """x with its first dimensions where these axes say; the others stay as they are."""
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(names))
        spec = PartitionSpec(*(name or None for name in names), *rest)
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _merged(x: jax.Array, first: int, count: int) -> jax.Array:
    """`count` dimensions from `first` on as one."""
    return x.reshape(*x.shape[:first], -1, *x.shape[first + count :])


# ---- the pieces of the stack -----------------------------------------------------------------------------------------


def _pieces(work: Work, leaf: jax.Array) -> jax.Array:
    """This stage's pieces of a leaf `(rounds, blocks, ...)`, from its part `(blocks, ...)` or from the whole."""
    stages, rounds = work.stages, work.rounds
    if not _floating(leaf):
        return leaf.reshape(rounds, stages, -1, *leaf.shape[1:])[:, lax.axis_index(work.axis)]
    leaf = leaf.reshape(rounds, -1, *leaf.shape[1:])
    return leaf if rounds == 1 else _dealt(leaf, work.axis, deal(stages, rounds))


class Move(NamedTuple):
    """A step of dealing pieces out: where each stage sends one, which of its own, and where it keeps what it gets."""

    to: tuple[int, ...]
    sent: tuple[int, ...]
    kept: tuple[int, ...]


def deal(stages: int, rounds: int) -> list[Move]:
    """How stages that hold pieces of a stack in order hand them out in turn: `rounds` moves, each a permutation.

    Piece p lies on stage p // rounds and goes to stage p % stages, as its piece p // stages. That is a bipartite graph
    in which each stage has `rounds` edges at either end, so it falls into so many perfect matchings (König 1916).

    >>> deal(stages=2, rounds=2)
    [Move(to=(1, 0), sent=(1, 0), kept=(1, 0)), Move(to=(0, 1), sent=(0, 1), kept=(0, 1))]
    """
    left = set(range(stages * rounds))
    moves = []
    for _ in range(rounds):
        matched: dict[int, int] = {}  # the piece that each stage gets
        for stage in range(stages):
            _match(stage, left, stages, rounds, matched, set())
        left -= set(matched.values())
        pieces = {p // rounds: p for p in matched.values()}
        moves.append(
            Move(
                tuple(pieces[s] % stages for s in range(stages)),
                tuple(pieces[s] % rounds for s in range(stages)),
                tuple(matched[s] // stages for s in range(stages)),
            )
        )
    return moves


def _match(stage: int, left: set[int], stages: int, rounds: int, matched: dict[int, int], tried: set[int]) -> bool:
    """Find a piece for `stage` to send, and others for those that it takes one from (Kuhn's augmenting paths)."""
    for piece in range(stage * rounds, (stage + 1) * rounds):
        goal = piece % stages
        if piece in left and goal not in tried:
            tried.add(goal)
            if goal not in matched or _match(matched[goal] // rounds, left, stages, rounds, matched, tried):
                matched[goal] = piece
                return True
    return False


def _dealt(leaf: jax.Array, axis: str, moves: list[Move]) -> jax.Array:
    stage = lax.axis_index(axis)
    got = jnp.zeros_like(leaf)
    for to, sent, kept in moves:
        piece = leaf[jnp.asarray(sent)[stage]]
        piece = lax.ppermute(piece, axis, list(enumerate(to)))
        got = lax.dynamic_update_index_in_dim(got, piece, jnp.asarray(kept)[stage], 0)
    return got


# ---- the forward pass ------------------------------------------------------------------------------------------------


def _forward(work: Work, pieces: list[jax.Array], waiting: Any, shared: Any) -> tuple[Any, Any]:
    """What one stage does: the share of the outputs it ends with, and what its pieces found."""
    table, stage = work.timetable, lax.axis_index(work.axis)
    outputs = waiting[0]  # overwritten before it is read, and of the right shapes

    def tick(carry, now):
        current, waiting, done = carry
        microbatch, turn = now["microbatch"][stage], now["round"][stage]
        current, waiting = _take(work, waiting, current, now["entering"], 0)
        active, microbatch = microbatch >= 0, jnp.maximum(microbatch, 0)
        v = work.enter([_at(piece, turn) for piece in pieces], microbatch)
        v, (x, riders), common = _shut(active, (v, current, shared))
        y, found = work.piece(v, x, riders, common)
        done = _put(work, done, y, now["leaving"], work.stages - 1)
        return (_send(work, (y, riders), 1), waiting, done), found

    # Before its first micro-batch a stage works on some other one: numbers as real as any, and never looked at.
    start = (jax.tree.map(lambda a: a[0], waiting), waiting, outputs)
    (_, _, done), found = scan(tick, start, _rows(table), table.ticks)
    mine = jnp.asarray(table.when())[stage]
    return done, jax.tree.map(lambda a: a[mine], found)


def _rows(table: Timetable) -> dict[str, jax.Array]:
    """The timetable as a loop reads it, tick by tick."""
    rows = {"microbatch": table.microbatch, "round": table.round, "entering": table.entering()}
    rows["leaving"] = table.leaving()
    if table.backward is not None:
        rows["backward"] = table.backward
    return {name: jnp.asarray(row, "int32") for name, row in rows.items()}


def _at(piece: jax.Array, turn: jax.Array) -> jax.Array:
    return piece[0] if len(piece) == 1 else lax.dynamic_index_in_dim(piece, turn, keepdims=False)


def _shut(active: jax.Array, tree: Any) -> Any:
    """The same numbers, but nothing flows back from an idle tick: a zero times what went wrong there would be NaN."""
    return jax.tree.map(lambda a: jnp.where(active, a, lax.stop_gradient(a)) if _floating(a) else a, tree)


def _send(work: Work, tree: Any, by: int) -> Any:
    """Each stage's arrays on the next one, or on the one before."""
    n = work.stages
    return jax.tree.map(lambda a: lax.ppermute(a, work.axis, [(i, (i + by) % n) for i in range(n)]), tree)


def _take(work: Work, stream: Any, current: Any, microbatch: jax.Array, at: int) -> tuple[Any, Any]:
    """What the end `at` of the pipeline (0 or the last stage) works on: the next of a stream, which moves on.

    Micro-batch m is in slot m % (slots), m // (slots) stages away; after each use its slot moves one stage closer.
    """
    some, end = microbatch >= 0, lax.axis_index(work.axis) == at
    slot = jnp.maximum(microbatch, 0) % len(jax.tree.leaves(stream)[0])
    here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), stream)
    current = jax.tree.map(lambda a, b: jnp.where(some & end, a, b), here, current)
    after = jax.tree.map(lambda a, b: jnp.where(some, a, b), _send(work, here, 1 if at else -1), here)
    return current, jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, slot, 0), stream, after)


def _put(work: Work, stream: Any, value: Any, microbatch: jax.Array, at: int) -> Any:
    """A stream after what left the end `at` of the pipeline: its slot moves away from the end, which fills it.

    When all micro-batches have left the last stage, m is in slot m % (slots) of stage m // (slots).
    """
    some, end = microbatch >= 0, lax.axis_index(work.axis) == at
    slot = jnp.maximum(microbatch, 0) % len(jax.tree.leaves(stream)[0])
    here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), stream)
    moved = _send(work, here, -1 if at else 1)
    after = jax.tree.map(lambda v, m, h: jnp.where(some, jnp.where(end, v, m), h), value, moved, here)
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, slot, 0), stream, after)


def _floating(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.inexact)


# ---- one forward, one backward ---------------------------------------------------------------------------------------


def _forward_then_backward(work: Work, pieces: list[jax.Array], waiting: Any, shared: Any) -> tuple[Any, Any]:
    """`_forward` with a gradient that keeps nothing but the arguments: see `_backward`."""
    one_way = work._replace(timetable=_without_backward(work.timetable))

    both = jax.custom_vjp(lambda *given: _forward(one_way, *given))
    both.defvjp(
        lambda *given: (_forward(one_way, *given), given),
        lambda given, slopes: _backward(work, *given, *slopes),
    )
    return both(pieces, waiting, shared)


def _without_backward(table: Timetable) -> Timetable:
    """The forward pass of a timetable alone, without the ticks that have none."""
    busy = (table.microbatch >= 0).any(1)
    return Timetable(table.microbatch[busy], table.round[busy])


class _Floats(NamedTuple):
    """A tree as what has a gradient and what has none."""

    tree: Any
    kept: list
    floats: list

    @classmethod
    def of(cls, tree: Any) -> "_Floats":
        leaves, structure = jax.tree.flatten(tree)
        kept = [None if _floating(a) else a for a in leaves]
        return cls(structure, kept, [a for a in leaves if _floating(a)])

    def with_floats(self, floats: Sequence) -> Any:
        """The tree with other numbers."""
        rest = iter(floats)
        return jax.tree.unflatten(self.tree, [next(rest) if a is None else a for a in self.kept])

    def gradient(self, floats: Sequence) -> Any:
        """Their gradients as a tree, None for what has none."""
        rest = iter(floats)
        return jax.tree.unflatten(self.tree, [next(rest) if a is None else None for a in self.kept])


def _backward(work: Work, pieces, waiting, shared, d_done, d_found) -> tuple[Any, Any, Any]:
    """The gradient of `_forward` by a second run: forward again, and backward a few ticks behind.

    A stage keeps the inputs of the micro-batches between the two, 2 x stages - 1 at most, and computes what else it
    needs again from them. So its memory does not grow with the number of micro-batches, and it costs a forward pass
    more than `jax.checkpoint` does.
    """
    table, stage, last = work.timetable, lax.axis_index(work.axis), work.stages - 1
    slots = min(2 * work.stages - 1, int(table.microbatch.max()) + 1)
    d_found = [a[0] for a in jax.tree.leaves(d_found) if _floating(a)]  # of one round, by micro-batch
    d_done = _turned(work, [a for a in jax.tree.leaves(d_done) if _floating(a)])
    first = jax.tree.map(lambda a: a[0], waiting)
    own, common = _Floats.of(pieces), _Floats.of(shared)

    def tick(carry, now):
        current, waiting, kept, back, arriving, gone, d_pieces, d_shared = carry
        coming, leaving = now["microbatch"][stage], now["backward"][stage]
        active, going = leaving >= 0, jnp.maximum(leaving, 0)

        current, waiting = _take(work, waiting, current, now["entering"], 0)
        kept = jax.tree.map(lambda a, b: _keep(a, b, coming, slots), kept, current)
        v = work.enter([_at(piece, jnp.int32(0)) for piece in pieces], jnp.maximum(coming, 0))
        y, _ = work.piece(v, *current, shared)
        after = _send(work, (y, current[1]), 1)

        inputs = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, going % slots, keepdims=False), kept)
        v = work.enter([_at(piece, jnp.int32(0)) for piece in pieces], going)
        outputs = len(d_done)  # x comes before what rides along, whose way ends at the last stage
        ends, arriving = _take(work, arriving, back[:outputs], now["backward"][last], last)
        rides = [jnp.where(stage == last, jnp.zeros_like(a), a) for a in back[outputs:]]
        slopes = [*ends, *rides], [lax.dynamic_index_in_dim(a, going, keepdims=False) for a in d_found]
        d_v, d_in, d_common = (
            [jnp.where(active, a, jnp.zeros_like(a)) for a in each] for each in _pulled(work, v, inputs, shared, slopes)
        )
        gone = _put(work, gone, d_in, now["backward"][0], 0)
        d_pieces = [total + a[None] for total, a in zip(d_pieces, d_v, strict=True)]
        d_shared = [total + a for total, a in zip(d_shared, d_common, strict=True)]
        return (after, waiting, kept, _send(work, d_in, -1), arriving, gone, d_pieces, d_shared), None

    zeros = lambda floats: [jnp.zeros_like(a) for a in floats]  # noqa: E731
    start = (
        first, waiting, jax.tree.map(lambda a: jnp.broadcast_to(a, (slots, *a.shape)), first),
        zeros(_Floats.of(first).floats), d_done, zeros(_Floats.of(waiting).floats), zeros(own.floats),
        zeros(common.floats),
    )  # fmt: skip
    (*_, gone, d_pieces, d_shared), _ = scan(tick, start, _rows(table), table.ticks)
    d_waiting = _Floats.of(waiting).gradient(_turned(work, gone))
    return own.gradient(d_pieces), d_waiting, common.gradient(d_shared)


def _pulled(work: Work, v: Any, inputs: Any, shared: Any, slopes: Any) -> tuple[list, list, list]:
    """The gradients of one piece, its forward pass included."""
    parts = _Floats.of(v), _Floats.of(inputs), _Floats.of(shared)

    def piece(*floats):
        v, (x, riders), shared = (part.with_floats(each) for part, each in zip(parts, floats, strict=True))
        y, found = work.piece(v, x, riders, shared)
        return _Floats.of((y, riders)).floats, _Floats.of(found).floats

    _, pull = jax.vjp(piece, *(part.floats for part in parts))
    return pull(slopes)


def _keep(kept: jax.Array, x: jax.Array, microbatch: jax.Array, slots: int) -> jax.Array:
    slot = jnp.maximum(microbatch, 0) % slots
    old = lax.dynamic_index_in_dim(kept, slot, keepdims=False)
    return lax.dynamic_update_index_in_dim(kept, jnp.where(microbatch >= 0, x, old), slot, 0)


def _turned(work: Work, tree: Any) -> Any:
    """The shares of the stages in the opposite order: the backward pass enters at the last one."""
    turns = [(i, work.stages - 1 - i) for i in range(work.stages)]
    return jax.tree.map(lambda a: lax.ppermute(a, work.axis, turns), tree)
