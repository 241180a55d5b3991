"""`Scan` as a pipeline: where the mesh has stages, each holds a part of the blocks, and micro-batches flow through."""

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
from sapwood.core.vars import Vars, declares
from sapwood.parallel.pipeline import engine, timetable
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.parallel.place_activations import Placement, placed, split_over
from sapwood.parallel.rules import describe

AXIS = "stage"
MOST = 4
"""Micro-batches for each stage, at most, where nobody says how many: the bubble is then below a fifth."""


def chosen(v: Vars, axis: str | None) -> bool:
    """Whether the rules of a cursor's run cut a stack, whose layer axis has this logical name, into stages.

    What declares sees the whole stack.
    """
    if not isinstance(v._place, Placement) or axis is None or declares(v):
        return False
    return _stages(v, axis) is not None


def inside() -> bool:
    """Whether what is traced is a block of a pipeline, which sees one micro-batch at a time."""
    mesh = jax.sharding.get_abstract_mesh()
    return AXIS in mesh.axis_names and mesh.axis_types[mesh.axis_names.index(AXIS)] == AxisType.Manual


def _stages(v: Vars, axis: str) -> Any:
    """The sharding of a layer axis that any number of stages divides, if it is split into stages."""
    size = math.prod(_placement(v).mesh.shape.values())
    sharding = placed(v, jax.ShapeDtypeStruct((size,), "int32"), axis)
    return sharding if AXIS in split_over(sharding, 0) else None


def _placement(v: Vars) -> Placement:
    assert isinstance(v._place, Placement)
    return v._place


def pipelined(
    v: Vars, block: Callable, n: int, axis: str, x: Any, args: tuple, batched: tuple[bool | None, ...]
) -> tuple[Any, Updates]:
    """`n` blocks in a row, `block(v, x, *args) -> (x, updates)`, as a pipeline: the result, and the updates of all.

    `batched` says which of `args` are cut as x is; None that whoever wrote the stack did not say.

    Raises `ConfigError` for blocks that the stages do not divide, micro-batches that do not divide the batch, or an
    argument that may have the batch or not; `InputError` for an x, or a batched argument, without a batch;
    `EffectError` for blocks that put state.
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
        return jax.tree.unflatten(structure, leaves).fold(microbatch)  # other keys for each micro-batch

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
    """What blocks hand back beside their result."""

    losses: dict
    captured: dict
    checks: dict


def _by_block(a: jax.Array) -> jax.Array:
    """`(stages, rounds, micro-batches, blocks, ...)` to `(blocks, micro-batches, ...)`, all blocks in order."""
    a = a.transpose(1, 0, 3, 2, *range(4, a.ndim))
    return a.reshape(-1, *a.shape[3:])


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _rounds(v: Vars, n: int, count: int, options: Pipeline) -> int:
    """How many pieces of the stack each stage has; a `ConfigError` where the blocks do not divide."""
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
    """The batch size: the leading dimension of all of x."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(x))
        raise InputError(
            f"{v._at()}: a pipeline cuts the batch, the leading dimension of all that its blocks hand on; got arrays "
            f"of shapes {shapes or 'none'}"
        )
    return sizes.pop()[0]


def _cut(v: Vars, mesh: Any, batch: int, options: Pipeline) -> engine.Cut:
    """How the batch is cut; a `ConfigError` where it cannot be."""
    count, wanted = mesh.shape[AXIS], options.microbatches
    names = split_over(placed(v, jax.ShapeDtypeStruct((batch,), "int32"), "batch"), 0)
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


# ---- what goes along, and what comes back ----------------------------------------------------------------------------


def _apart(v: Vars, args: tuple, batched: tuple, batch: int) -> tuple[list, list, Callable[[list, list], tuple]]:
    """What of `args` travels with its micro-batch, what is the same for all, and what puts them together again."""
    named, structure = jax.tree_util.tree_flatten_with_path(args)
    travels = [_travels(v, path, leaf, batched[path[0].idx], batch) for path, leaf in named]
    leaves = [jnp.asarray(leaf) for _, leaf in named]

    def whole(riders: list, shared: list) -> tuple:
        either = {True: iter(riders), False: iter(shared)}
        return jax.tree.unflatten(structure, [next(either[travel]) for travel in travels])

    riders, shared = ([a for a, t in zip(leaves, travels, strict=True) if t is side] for side in (True, False))
    return riders, shared, whole


def _travels(v: Vars, path: Any, leaf: Any, batched: bool | None, batch: int) -> bool:
    """Whether an array goes with its micro-batch; an error where only its size speaks for that, which may be chance."""
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
    """State written by one micro-batch after the other would not be what the whole batch gives."""
    for path, _ in paths.leaves(state, v._path):
        raise EffectError(
            f"{paths.join(path)}: the blocks of a pipeline cannot put state: each sees one micro-batch at a time, "
            "whose statistics are not those of the batch. Normalise without them (LayerNorm, RMSNorm, GroupNorm), or "
            f"choose a mesh without {AXIS!r}"
        )


def _put_together(captured: dict, like: dict, cut: engine.Cut, v: Vars) -> dict:
    """What the micro-batches sowed `(blocks, micro-batches, ...)` as the whole batch would have.

    What has the batch as a dimension is put together, and of what has not the mean is taken.
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
