"""`Scan` as a pipeline: each stage of the mesh holds a part of the blocks, and micro-batches flow through the stages.

`Scan` calls `pipelined` where `chosen` is true. This file checks sizes, cuts the batch and the arguments, and combines
what the blocks return. `sapwood.parallel.pipeline.engine` runs the pipeline itself.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from sapwood.core import paths
from sapwood.core.effects import Updates
from sapwood.core.errors import ConfigError, EffectError, InputError
from sapwood.core.scan import scan
from sapwood.core.vars import Vars, is_declaring
from sapwood.parallel.pipeline import engine, timetable
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.parallel.place_activations import Placement, activation_sharding, split_over
from sapwood.parallel.rules import describe

AXIS = "stage"
MOST = 4
"""Largest default number of micro-batches for each stage. With this many, the bubble is below a fifth."""


def chosen(v: Vars, axis: str | None) -> bool:
    """True if the rules of the cursor's run split a stack with this logical layer axis into pipeline stages.

    False while variables are declared or initialized: that run sees the whole stack.
    """
    if not isinstance(v._place, Placement) or axis is None or is_declaring(v):
        return False
    return _stages(v, axis) is not None


def inside() -> bool:
    """True while a block of a pipeline is traced. Such a block sees one micro-batch at a time."""
    mesh = jax.sharding.get_abstract_mesh()
    return AXIS in mesh.axis_names and mesh.axis_types[mesh.axis_names.index(AXIS)] == AxisType.Manual


def _stages(v: Vars, axis: str) -> Any:
    """The sharding of the layer axis if the rules split it over "stage", else None.

    The rules are asked about a stack as long as the number of devices, which any number of stages divides. `_rounds`
    checks the real length.
    """
    size = math.prod(_placement(v).mesh.shape.values())
    sharding = activation_sharding(v, jax.ShapeDtypeStruct((size,), "int32"), axis)
    return sharding if AXIS in split_over(sharding, 0) else None


def _placement(v: Vars) -> Placement:
    assert isinstance(v._place, Placement)
    return v._place


def pipelined(
    v: Vars, block: Callable, n: int, axis: str, x: Any, args: tuple, batched: tuple[bool | None, ...]
) -> tuple[Any, Updates]:
    """Apply `n` blocks in a row, `block(v, x, *args) -> (x, updates)`, as a pipeline.

    Args:
        v: the stack's cursor.
        block: one block, which treats each example independently.
        n: number of blocks.
        axis: logical name of the layer axis.
        x: pytree of arrays, all with the batch as first dimension.
        args: further arguments of each block, pytrees of arrays.
        batched: for each of `args`: True if it is cut into micro-batches like x, False if it is the same for all, None
            if the author of the stack did not say.

    Returns:
        x after the last block, and the updates of all blocks.

    Raises:
        ConfigError: the stages do not divide the blocks, the micro-batches do not divide the batch, or an argument with
            `batched` None has a first dimension of the batch's size.
        InputError: x, or a batched argument, has no batch dimension.
        EffectError: a block puts state.
    """
    mesh, options = _stages(v, axis).mesh, _placement(v).rules.pipeline
    count = mesh.shape[AXIS]
    rounds = _rounds(v, n, count, options)
    batch = _batch(v, x)
    cut = _cut(v, mesh, batch, options)
    table = _timetable(options, count, cut.microbatches, rounds)

    stacked = v.stack(n, axis)
    leaves, structure = jax.tree.flatten(stacked)
    travel, shared, whole = _apart(v, args, batched, batch)

    def enter(leaves: list, microbatch: jax.Array) -> Vars:
        return jax.tree.unflatten(structure, leaves).fold(microbatch)  # random keys differ between micro-batches

    def piece(v: Vars, x: Any, riders: list, shared: list) -> tuple[Any, Found]:
        here = whole(riders, shared)
        x, updates = scan(lambda x, v: block(v, x, *here), x, v, n // (count * rounds))
        _refuse_state(updates.state, stacked)
        return x, Found(updates.losses, updates.captured, updates.checks)

    work = engine.Work(enter, piece, table, mesh, AXIS)
    y, found = engine.run(work, leaves, jax.tree.map(cut.enter, x), jax.tree.map(cut.enter, travel), shared)
    found = Found(*jax.tree.map(_by_block, tuple(found)))
    losses = jax.tree.map(lambda a: jnp.mean(a, 1), found.losses)
    captured = found.captured
    if jax.tree.leaves(captured):
        like = jax.eval_shape(lambda v, x, args: scan(lambda x, v: block(v, x, *args), x, v, n), stacked, x, args)
        captured = _put_together(captured, like[1].captured, cut, v)
    return jax.tree.map(cut.leave, y), Updates({}, losses, captured, found.checks)


class Found(NamedTuple):
    """Losses, captured values and checks that the blocks return beside x."""

    losses: dict
    captured: dict
    checks: dict


def _by_block(a: jax.Array) -> jax.Array:
    """Reorder `(stages, rounds, micro-batches, blocks, ...)` to `(blocks, micro-batches, ...)`, blocks in order."""
    a = a.transpose(1, 0, 3, 2, *range(4, a.ndim))
    return a.reshape(-1, *a.shape[3:])


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _rounds(v: Vars, n: int, count: int, options: Pipeline) -> int:
    """Number of pieces of the stack on each stage. Raises `ConfigError` if `n` is no multiple of all pieces."""
    rounds = options.rounds if options.schedule == "interleaved" else 1
    if n % (count * rounds) == 0:
        return rounds
    more = -(-n // (count * rounds)) * count * rounds
    fits = [f"{AXIS}={_either(found)}"] if (found := [s for s in range(1, n + 1) if n % (s * rounds) == 0]) else []
    if rounds > 1 and (found := [r for r in range(1, n // count + 1) if n % (count * r) == 0]):
        fits.append(f"rounds={_either(found)}")
    works = f"{' or '.join(fits)} works with {n} blocks, and " if fits else ""
    raise ConfigError(
        f"{v._at()}: {n} blocks do not divide into {count} stages{f' in {rounds} rounds' if rounds > 1 else ''} (mesh "
        f"{describe(_placement(v).mesh)}); {works}{more} blocks work with {AXIS}={count}"
    )


def _batch(v: Vars, x: Any) -> int:
    """Batch size, the first dimension of every array in x. Raises `InputError` if they differ in it or lack it."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(x))
        raise InputError(
            f"{v._at()}: a pipeline cuts the batch, the leading dimension of all that its blocks hand on; got arrays "
            f"of shapes {shapes or 'none'}"
        )
    return sizes.pop()[0]


def _cut(v: Vars, mesh: Any, batch: int, options: Pipeline) -> engine.Cut:
    """How the batch is cut into micro-batches. Raises `ConfigError` if their number does not fit batch or stages."""
    count, wanted = mesh.shape[AXIS], options.microbatches
    names = split_over(activation_sharding(v, jax.ShapeDtypeStruct((batch,), "int32"), "batch"), 0)
    others = [name for name in names if name != AXIS]
    shards = math.prod(mesh.shape[name] for name in others)
    rows = batch // shards
    fits = [m for m in range(count, rows + 1, count) if rows % m == 0]
    if wanted is None and fits:
        wanted = max(m for m in fits if m <= MOST * count or m == fits[0])
    if wanted in fits:
        return engine.Cut(mesh, AXIS, names if AXIS in names else (*names, AXIS), wanted)
    if wanted is None or wanted % count:
        needs, least = f"their number must be a multiple of the {count} stages", count
    else:
        needs, least = "each must have as many rows as the others", wanted
    if others:
        needs += " on each of " + " × ".join(f"{name}={mesh.shape[name]}" for name in others)
    near = [size for size in (batch // (least * shards) * least * shards, least * shards) if size > 0]
    works = f"microbatches={_either(fits)} works with it" if fits else f"a batch of {max(near)} works"
    raise ConfigError(
        f"{v._at()}: a batch of {batch} does not divide into {wanted or 'the'} micro-batches of a pipeline (mesh "
        f"{describe(mesh)}): {needs}; {works}"
    )


def _either(numbers: Any) -> str:
    return " or ".join(map(str, numbers))


def _timetable(options: Pipeline, count: int, microbatches: int, rounds: int) -> timetable.Timetable:
    if options.schedule == "1f1b":
        return timetable.forward_backward(count, microbatches)
    return timetable.forward(count, microbatches, rounds)


# ---- arguments of the blocks, and values that they return ------------------------------------------------------------


def _apart(v: Vars, args: tuple, batched: tuple, batch: int) -> tuple[list, list, Callable[[list, list], tuple]]:
    """Separate the arrays of `args` into those cut into micro-batches and those shared by all micro-batches.

    Returns both lists, and the function that rebuilds `args` from them.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(args)
    travels = [_travels(v, path, leaf, batched[path[0].idx], batch) for path, leaf in named]
    leaves = [jnp.asarray(leaf) for _, leaf in named]

    def whole(riders: list, shared: list) -> tuple:
        either = {True: iter(riders), False: iter(shared)}
        return jax.tree.unflatten(structure, [next(either[travel]) for travel in travels])

    riders, shared = ([a for a, t in zip(leaves, travels, strict=True) if t is side] for side in (True, False))
    return riders, shared, whole


def _travels(v: Vars, path: Any, leaf: Any, batched: bool | None, batch: int) -> bool:
    """True if an array of `args` is cut into micro-batches.

    Raises `ConfigError` if `batched` is None and the first dimension has the size of the batch, which may be chance.
    Raises `InputError` if `batched` is true and it has another size.
    """
    alike = jnp.shape(leaf)[:1] == (batch,)
    what = f"{v._at()}: args{jax.tree_util.keystr(path)} of the stack, of shape {jnp.shape(leaf)}"
    if batched is None and alike:
        raise ConfigError(
            f"{what}, has a first dimension of the size of the batch, which a pipeline cuts. Say whether it goes with "
            "the examples, Scan(batched=True), or is the same for all, Scan(batched=False); a tuple speaks for each "
            "argument beside x"
        )
    if batched and not alike:
        raise InputError(f"{what}, is batched: a first dimension of {batch}, the size of the batch, is expected")
    return bool(batched)


def _refuse_state(state: dict, v: Vars) -> None:
    """Raise `EffectError` if the blocks put state: micro-batches in turn write other values than the whole batch."""
    for path, _ in paths.leaves(state, v._path):
        raise EffectError(
            f"{paths.join(path)}: the blocks of a pipeline cannot put state: each sees one micro-batch at a time, "
            "whose statistics are not those of the batch. Normalise without them (LayerNorm, RMSNorm, GroupNorm), or "
            f"choose a mesh without {AXIS!r}"
        )


def _put_together(captured: dict, like: dict, cut: engine.Cut, v: Vars) -> dict:
    """Combine values sown by the micro-batches, `(blocks, micro-batches, ...)`, into those of the whole batch.

    `like` has the shapes that the whole batch gives. Values with a batch dimension are concatenated along it. Floating
    values without one are averaged over the micro-batches. Raises `EffectError` for others.
    """

    def one(path: Any, a: jax.Array, whole: Any) -> jax.Array:
        shape = (a.shape[0], *a.shape[2:])
        if shape == whole.shape and jnp.issubdtype(a.dtype, jnp.inexact):
            return jnp.mean(a, 1, dtype=a.dtype)
        differ = [dim for dim, (m, w) in enumerate(zip(shape, whole.shape, strict=True)) if m != w]
        if len(differ) == 1 and shape[differ[0]] * cut.microbatches == whole.shape[differ[0]]:
            dim = differ[0]
            a = jnp.moveaxis(a, (1, dim + 1), (0, 1))
            a = a.reshape(cut.mesh.shape[AXIS], -1, *a.shape[1:])
            return jnp.moveaxis(cut.leave(a), 0, dim)
        raise EffectError(
            f"{v._at()}/{jax.tree_util.keystr(path, simple=True, separator='/')}: {a.dtype}{list(shape[1:])} was sown "
            f"in each of {cut.microbatches} micro-batches, where the whole batch gives {list(whole.shape[1:])}; a "
            "pipeline puts together what has the batch as one dimension, and takes the mean of floating-point numbers"
        )

    return jax.tree_util.tree_map_with_path(one, captured, like)
