"""Batches on a mesh: their sharding, the rows that each process supplies, and global arrays from host arrays.

Dimension 0 of every array in a batch is the batch dimension. It is split over the mesh axes of the ``batch`` rule; the
other dimensions are not split. The number of parts is `shards`, and a batch size must be a multiple of it. With
pipeline stages, `batch_multiple` counts the micro-batches too. With several processes, each one supplies a contiguous
part of every global batch (`feed`).
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from sapwood.core.errors import ConfigError
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.rule_tables import resolve
from sapwood.parallel.rules import Rules, assign, describe, partition


def batch_sharding(mesh: AnyMesh, rules: Rules | str | None = None) -> NamedSharding:
    """The sharding of a batch: dimension 0 is split over the mesh axes of the ``batch`` rule, the others are whole.

    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> tuple(parallel.batch_sharding(AbstractMesh((4, 2, 2), ("data", "fsdp", "tensor"))).spec)
    (('data', 'fsdp'),)

    Raises:
        ConfigError: `mesh` and `rules` do not fit together (see `parallel.rule_tables.resolve`).
    """
    mesh, rules = resolve(mesh, rules)
    placed, _ = assign(rules.table, ("batch",), (0,), mesh.shape)  # size 0 divides by any number of shards
    return NamedSharding(mesh, partition(placed))


def shards(sharding: NamedSharding) -> int:
    """Number of parts that dimension 0 is split into. Batch sizes must be multiples of it.

    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> parallel.shards(parallel.batch_sharding(AbstractMesh((4, 2), ("data", "tensor"))))
    4
    """
    return int(np.prod([sharding.mesh.shape[axis] for axis in _batch_axes(sharding)], dtype=int))


def batch_multiple(mesh: AnyMesh, rules: Rules | str | None = None) -> int:
    """A batch size that is a multiple of this number works with every model on this mesh.

    Without pipeline stages it is the number of shards (`shards`). With stages it is the least common multiple of the
    number of shards and ``m * n``. Here ``m`` is the number of micro-batches (default: the number of stages), and ``n``
    is the number of parts into which the mesh axes other than "stage" split the batch.

    >>> import dataclasses
    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> mesh = AbstractMesh((2, 4), ("data", "stage"))
    >>> rules = dataclasses.replace(parallel.DEFAULT, pipeline=parallel.Pipeline(microbatches=12))
    >>> batch_multiple(mesh), batch_multiple(mesh, rules)
    (8, 24)

    Raises:
        ConfigError: `mesh` and `rules` do not fit together (see `parallel.rule_tables.resolve`).
    """
    mesh, rules = resolve(mesh, rules)
    sharding, stages = batch_sharding(mesh, rules), mesh.shape.get("stage", 1)
    if stages == 1:
        return shards(sharding)
    others = math.prod(mesh.shape[axis] for axis in _batch_axes(sharding) if axis != "stage")
    return math.lcm(shards(sharding), others * (rules.pipeline.microbatches or stages))


def check_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Check that a batch can be split, and return it. `batch` is a pytree of global arrays or of their shapes.

    Raises:
        ConfigError: a leaf is a scalar, or its dtype is text, object or a time; the leaves differ in batch size; or
            the batch size is zero or no multiple of the number of shards.
    """
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "(batch)"
        if np.ndim(leaf) == 0:
            raise ConfigError(f"batch entry {name!r} is a scalar; each needs a leading batch dimension")
        dtype = getattr(leaf, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype.kind in "SUOMm":  # text, objects, times
            raise ConfigError(
                f"batch entry {name!r} has dtype {dtype}, which no device can hold; turn it into numbers, or leave it "
                "out of the batch"
            )
        sizes.setdefault(np.shape(leaf)[0], name)
    if len(sizes) > 1:
        found = ", ".join(f"{name!r} has {size}" for size, name in sizes.items())
        raise ConfigError(f"the entries of a batch differ in their batch size: {found}")
    for size in sizes:
        check_batch_size(size, sharding)
    return batch


def check_batch_size(size: int, sharding: NamedSharding) -> int:
    """Check that a global batch of this size can be split, and return the size.

    Raises:
        ConfigError: the size is zero or no multiple of the number of shards. The message names sizes that fit.
    """
    parts = shards(sharding)
    if size % parts or size < 1:
        mesh = describe(sharding.mesh)
        below, above = size - size % parts, size - size % parts + parts
        near = f"{above}" if below < parts else f"{below} or {above}"
        smaller = "is smaller than" if size < parts else "does not divide over"
        over = " × ".join(f"{axis}={sharding.mesh.shape[axis]}" for axis in _batch_axes(sharding))
        raise ConfigError(
            f"batch size {size} {smaller} the {parts} shards of mesh {mesh} ({over}); use {near}, or a smaller mesh"
        )
    return size


class Feed(NamedTuple):
    """The part of each global batch that one process supplies: part `index` of `count` equal parts, in order."""

    index: int
    count: int


def feed(sharding: NamedSharding, process: int | None = None) -> Feed:
    """Which part of every global batch a process supplies.

    It is not always part ``process_index`` of ``process_count``: if tensor or sequence axes span processes, several
    processes supply the same rows. `process` is the index of a process; None is this process.

    >>> import sapwood.parallel as parallel
    >>> parallel.feed(parallel.batch_sharding(parallel.mesh("data=-1")))
    Feed(index=0, count=1)

    Raises:
        ConfigError: the processes do not hold equal contiguous parts (their rows overlap in part, for example), or the
            mesh has no device of this process.
    """
    parts = shards(sharding)
    rows: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((parts,)).items():
        rows.setdefault(_process_of(device), set()).update(range(*index.indices(parts)))
    process = jax.process_index() if process is None else process
    if process not in rows:
        raise ConfigError(
            f"mesh {describe(sharding.mesh)}: none of its devices belongs to process {process}, only to "
            f"{', '.join(map(str, sorted(rows)))}; make the mesh of devices of all processes"
        )
    mine = rows[process]
    size = len(mine)
    blocks = {frozenset(r) for r in rows.values()}
    even = blocks == {frozenset(range(start, start + size)) for start in range(0, parts, size)}
    if not even:
        raise ConfigError(
            f"mesh {describe(sharding.mesh)}: the processes do not feed equal runs of rows of a batch: "
            f"{ {p: sorted(r) for p, r in rows.items()} }; order the devices so that each has neighbours"
        )
    return Feed(min(mine) // size, parts // size)


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Make global arrays, split over the devices, from this process's part of a batch (see `feed`).

    `batch` is a pytree of host arrays. With one process it is the whole batch.

    >>> import numpy as np, sapwood.parallel as parallel
    >>> sharding = parallel.batch_sharding(parallel.mesh("data=-1"))
    >>> batch = parallel.put_batch({"image": np.zeros((16, 8, 8))}, sharding)
    >>> batch["image"].shape, batch["image"].sharding == sharding
    ((16, 8, 8), True)

    Raises:
        ConfigError: the global batch cannot be split (see `check_batch`).
    """
    count = feed(sharding).count if jax.process_count() > 1 else 1

    def globally(x):
        return jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype) if np.ndim(x) else x

    whole = jax.tree.map(globally, batch)
    check_batch(whole, sharding)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x, w: jax.make_array_from_process_local_data(sharding, np.asarray(x), w.shape), batch, whole
    )


def _batch_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that split dimension 0."""
    first = (*sharding.spec, None)[0]
    return () if first is None else (first,) if isinstance(first, str) else tuple(first)


def _process_of(device: Any) -> int:
    return device.process_index
