"""The pipeline engine: each stage holds a part of a stack, all stages work at once and pass micro-batches on.

The engine is one `jax.shard_map` over the mesh axis of the stages only, so other mesh axes shard inside a stage as they
do elsewhere. A loop runs over the ticks of a `Timetable`: in each tick, a stage applies a piece of its blocks to one
micro-batch and sends the result to the next stage. JAX's gradient of the loop is the pipeline in reverse, with the
memory of GPipe. If the timetable has backward passes (1f1b), `_backward` is the gradient.

Inputs and outputs are spread over the stages. Each stage holds an equal share of the micro-batches, one in each of its
slots. They stream: whenever the first stage takes a micro-batch, the micro-batches in that slot move one stage towards
it. So no stage ever holds all of them, and nothing is gathered.

In this file, a *piece* is the blocks that one stage runs in one round; *riders* are arrays that travel with their
micro-batch from stage to stage; *shared* arrays are the same for all micro-batches; *found* is what a piece reports
beside its result.
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
    """The work of a pipeline.

    Attributes:
        enter: ``(leaves, microbatch) -> v`` makes the variables of one piece from its leaves.
        piece: ``(v, x, riders, shared) -> (y, found)`` applies one piece to a micro-batch.
        timetable: the schedule.
        mesh: the mesh.
        axis: the mesh axis of the stages.
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
    """Apply the stack to all micro-batches.

    Args:
        work: the functions, the schedule and the mesh.
        leaves: the arrays of the stack; their first dimension is the blocks.
        x: the input, a pytree of arrays `(stages, micro-batches / stages, rows, ...)` as `Cut.enter` makes them.
        riders: arrays that travel with their micro-batch, in the same form.
        shared: arrays that are the same for all micro-batches.

    Returns:
        The result, in the form of x, and what the pieces found, `(stages, rounds, micro-batches, ...)`.
    """
    held, ends = PartitionSpec(work.axis), (PartitionSpec(work.axis), PartitionSpec(work.axis))

    def local(leaves, waiting, shared):
        pieces = [_pieces(work, leaf) for leaf in leaves]
        one = _forward if work.timetable.backward is None else _forward_then_backward
        return jax.tree.map(lambda a: a[None], one(work, pieces, jax.tree.map(lambda a: a[0], waiting), shared))

    # Leaves that are not floating-point, such as keys, are small. Every stage has them whole.
    specs = [held if _floating(leaf) else PartitionSpec() for leaf in leaves]
    on_stages = jax.shard_map(
        local, mesh=work.mesh, in_specs=(specs, held, PartitionSpec()), out_specs=ends, axis_names={work.axis},
        check_vma=False,
    )  # fmt: skip
    compiled = jax.jit(on_stages)  # the compiler shards the other axes, so it must be jitted
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        compiled = functools.partial(_compiled, compiled)
    return compiled(list(leaves), (x, riders), shared)


def _compiled(f: Callable, *given: Any) -> Any:
    """Run ``f(*given)`` and its gradient compiled, under `jax.disable_jit`, where all other code runs op by op."""

    def forward(*given: Any) -> Any:
        with jax.disable_jit(False):
            return jax.vjp(f, *given)

    def backward(pull: Callable, slopes: Any) -> Any:
        with jax.disable_jit(False):
            return pull(slopes)

    apart = jax.custom_vjp(lambda *given: forward(*given)[0])
    apart.defvjp(forward, backward)
    return apart(*given)


# ---- how a batch is cut ----------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a batch is cut into micro-batches. The cut is strided, so that every device keeps its rows.

    Attributes:
        mesh: the mesh.
        axis: the mesh axis of the stages.
        names: the mesh axes that the batch is split over, including that of the stages.
        microbatches: the number of micro-batches.
    """

    mesh: AnyMesh
    axis: str
    names: tuple[str, ...]
    microbatches: int

    def enter(self, x: jax.Array) -> jax.Array:
        """Reshape `(batch, ...)` to `(stages, micro-batches / stages, rows, ...)`."""
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
        """The five sizes that the batch dimension is split into, and the mesh axes before and after the transpose.

        The sizes are the shards of the axes before that of the stages, the stages, the shards of the axes after it, the
        micro-batches for each stage, and the rows of a micro-batch on each device.
        """
        at, size = self.names.index(self.axis), self.mesh.shape
        before, after = self.names[:at], self.names[at + 1 :]
        a, c = (math.prod(size[name] for name in names) for names in (before, after))
        s = size[self.axis]
        q = self.microbatches // s
        sizes = (a, s, c, q, batch // (a * c * self.microbatches))
        return sizes, (before, self.axis, after), (self.axis, None, before + after)

    def _lie(self, x: jax.Array, names: tuple) -> jax.Array:
        """Constrain the first dimensions of x to these mesh axes. The other dimensions are unconstrained."""
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(names))
        spec = PartitionSpec(*(name or None for name in names), *rest)
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _merged(x: jax.Array, first: int, count: int) -> jax.Array:
    """Merge `count` dimensions, from `first` on, into one."""
    return x.reshape(*x.shape[:first], -1, *x.shape[first + count :])


# ---- the pieces of the stack -----------------------------------------------------------------------------------------


def _pieces(work: Work, leaf: jax.Array) -> jax.Array:
    """This stage's pieces of a leaf, `(rounds, blocks, ...)`.

    `leaf` is this stage's part `(blocks, ...)`, or the whole leaf if it is not floating-point.
    """
    stages, rounds = work.stages, work.rounds
    if not _floating(leaf):
        return leaf.reshape(rounds, stages, -1, *leaf.shape[1:])[:, lax.axis_index(work.axis)]
    leaf = leaf.reshape(rounds, -1, *leaf.shape[1:])
    return leaf if rounds == 1 else _dealt(leaf, work.axis, deal(stages, rounds))


class Move(NamedTuple):
    """One step of dealing out pieces: every stage sends one piece and gets one. Each field has an entry per stage.

    Attributes:
        to: the stage that it sends a piece to.
        sent: which of its stored pieces it sends.
        kept: at which index it keeps the piece that it gets.
    """

    to: tuple[int, ...]
    sent: tuple[int, ...]
    kept: tuple[int, ...]


def deal(stages: int, rounds: int) -> list[Move]:
    """The moves from stages that store consecutive pieces to stages that run every `stages`-th piece.

    There are `rounds` moves, each a permutation of the stages. Piece p is stored on stage p // rounds. It goes to stage
    p % stages, as that stage's piece p // stages. This is a bipartite graph in which each stage has `rounds` edges at
    either end, so it decomposes into `rounds` perfect matchings (König 1916).

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
    """Find a piece for `stage` to send (Kuhn's augmenting paths). Changes `matched`; False if there is none.

    If another stage already sends to the goal of that piece, the other stage gets another piece to send.
    """
    for piece in range(stage * rounds, (stage + 1) * rounds):
        goal = piece % stages
        if piece in left and goal not in tried:
            tried.add(goal)
            if goal not in matched or _match(matched[goal] // rounds, left, stages, rounds, matched, tried):
                matched[goal] = piece
                return True
    return False


def _dealt(leaf: jax.Array, axis: str, moves: list[Move]) -> jax.Array:
    """This stage's pieces of a leaf after all `moves` of `deal`."""
    stage = lax.axis_index(axis)
    got = jnp.zeros_like(leaf)
    for to, sent, kept in moves:
        piece = leaf[jnp.asarray(sent)[stage]]
        piece = lax.ppermute(piece, axis, list(enumerate(to)))
        got = lax.dynamic_update_index_in_dim(got, piece, jnp.asarray(kept)[stage], 0)
    return got


# ---- the forward pass ------------------------------------------------------------------------------------------------


def _forward(work: Work, pieces: list[jax.Array], waiting: Any, shared: Any) -> tuple[Any, Any]:
    """The forward pass on one stage: its share of the outputs, and what its pieces found."""
    table, stage = work.timetable, lax.axis_index(work.axis)
    outputs = waiting[0]  # only for its shapes: every slot is overwritten before it is read

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

    # Before its first micro-batch arrives, a stage computes with another one. The numbers are valid, and never used.
    start = (jax.tree.map(lambda a: a[0], waiting), waiting, outputs)
    (_, _, done), found = scan(tick, start, _rows(table), table.ticks)
    mine = jnp.asarray(table.when())[stage]
    return done, jax.tree.map(lambda a: a[mine], found)


def _rows(table: Timetable) -> dict[str, jax.Array]:
    """The timetable as int32 arrays whose first dimension is the tick, for the loop to scan over."""
    rows = {"microbatch": table.microbatch, "round": table.round, "entering": table.entering()}
    rows["leaving"] = table.leaving()
    if table.backward is not None:
        rows["backward"] = table.backward
    return {name: jnp.asarray(row, "int32") for name, row in rows.items()}


def _at(piece: jax.Array, turn: jax.Array) -> jax.Array:
    return piece[0] if len(piece) == 1 else lax.dynamic_index_in_dim(piece, turn, keepdims=False)


def _shut(active: jax.Array, tree: Any) -> Any:
    """The same values, without a gradient from an idle tick. There, zero times an infinite derivative would be NaN."""
    return jax.tree.map(lambda a: jnp.where(active, a, lax.stop_gradient(a)) if _floating(a) else a, tree)


def _send(work: Work, tree: Any, by: int) -> Any:
    """Send each stage's arrays to the stage `by` further on: 1 is the next stage, -1 is the previous one."""
    n = work.stages
    return jax.tree.map(lambda a: lax.ppermute(a, work.axis, [(i, (i + by) % n) for i in range(n)]), tree)


def _take(work: Work, stream: Any, current: Any, microbatch: jax.Array, at: int) -> tuple[Any, Any]:
    """Take a micro-batch from a stream at one end of the pipeline. `at` is that end: stage 0 or the last stage.

    Micro-batch m is in slot m % slots, m // slots stages away from the end. After each use of a slot, the micro-batches
    in it move one stage closer. If `microbatch` is -1, nothing is taken or moved.

    Returns:
        What each stage works on (the micro-batch at the end, `current` elsewhere), and the stream afterwards.
    """
    some, end = microbatch >= 0, lax.axis_index(work.axis) == at
    slot = jnp.maximum(microbatch, 0) % len(jax.tree.leaves(stream)[0])
    here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), stream)
    current = jax.tree.map(lambda a, b: jnp.where(some & end, a, b), here, current)
    after = jax.tree.map(lambda a, b: jnp.where(some, a, b), _send(work, here, 1 if at else -1), here)
    return current, jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, slot, 0), stream, after)


def _put(work: Work, stream: Any, value: Any, microbatch: jax.Array, at: int) -> Any:
    """Put a micro-batch that left the pipeline into a stream; the counterpart of `_take`.

    The micro-batches in its slot move one stage away from the end `at`, and the end stores `value` in that slot. When
    all micro-batches have left the last stage, m is in slot m % slots of stage m // slots.
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
    """`_forward` with the gradient `_backward`. Only the arguments are kept for it."""
    one_way = work._replace(timetable=_without_backward(work.timetable))

    both = jax.custom_vjp(lambda *given: _forward(one_way, *given))
    both.defvjp(
        lambda *given: (_forward(one_way, *given), given),
        lambda given, slopes: _backward(work, *given, *slopes),
    )
    return both(pieces, waiting, shared)


def _without_backward(table: Timetable) -> Timetable:
    """The timetable's forward passes only, without the ticks that have none."""
    busy = (table.microbatch >= 0).any(1)
    return Timetable(table.microbatch[busy], table.round[busy])


class _Floats(NamedTuple):
    """A pytree as its floating-point leaves, which have gradients, and its other leaves.

    Attributes:
        tree: the structure.
        kept: one entry per leaf: the leaf itself, or None if it is floating-point.
        floats: the floating-point leaves.
    """

    tree: Any
    kept: list
    floats: list

    @classmethod
    def of(cls, tree: Any) -> "_Floats":
        leaves, structure = jax.tree.flatten(tree)
        kept = [None if _floating(a) else a for a in leaves]
        return cls(structure, kept, [a for a in leaves if _floating(a)])

    def with_floats(self, floats: Sequence) -> Any:
        """The pytree with these floating-point leaves."""
        rest = iter(floats)
        return jax.tree.unflatten(self.tree, [next(rest) if a is None else a for a in self.kept])

    def gradient(self, floats: Sequence) -> Any:
        """The gradients of the floating-point leaves as a pytree, with None for other leaves."""
        rest = iter(floats)
        return jax.tree.unflatten(self.tree, [next(rest) if a is None else None for a in self.kept])


def _backward(work: Work, pieces, waiting, shared, d_done, d_found) -> tuple[Any, Any, Any]:
    """The gradient of `_forward` by a second run: the forward pass again, and the backward pass a few ticks behind.

    A stage keeps only the inputs of micro-batches that are between the two passes, at most 2 x stages - 1, and
    recomputes the rest from them. So its memory does not grow with the number of micro-batches. It costs one forward
    pass more than `jax.checkpoint`. `d_done` and `d_found` are the cotangents of the results of `_forward`.
    """
    table, stage, last = work.timetable, lax.axis_index(work.axis), work.stages - 1
    slots = min(2 * work.stages - 1, int(table.microbatch.max()) + 1)
    d_found = [a[0] for a in jax.tree.leaves(d_found) if _floating(a)]  # its only round: `(micro-batches, ...)`
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
        outputs = len(d_done)  # leaves of x come first, then riders, which end at the last stage
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
    """The cotangents of one piece's variables, inputs and shared arrays. Runs its forward pass too."""
    parts = _Floats.of(v), _Floats.of(inputs), _Floats.of(shared)

    def piece(*floats):
        v, (x, riders), shared = (part.with_floats(each) for part, each in zip(parts, floats, strict=True))
        y, found = work.piece(v, x, riders, shared)
        return _Floats.of((y, riders)).floats, _Floats.of(found).floats

    _, pull = jax.vjp(piece, *(part.floats for part in parts))
    return pull(slopes)


def _keep(kept: jax.Array, x: jax.Array, microbatch: jax.Array, slots: int) -> jax.Array:
    """Store x in the slot of its micro-batch; -1 stores nothing."""
    slot = jnp.maximum(microbatch, 0) % slots
    old = lax.dynamic_index_in_dim(kept, slot, keepdims=False)
    return lax.dynamic_update_index_in_dim(kept, jnp.where(microbatch >= 0, x, old), slot, 0)


def _turned(work: Work, tree: Any) -> Any:
    """The shares of the stages in reverse order, because the backward pass enters at the last stage."""
    turns = [(i, work.stages - 1 - i) for i in range(work.stages)]
    return jax.tree.map(lambda a: lax.ppermute(a, work.axis, turns), tree)
