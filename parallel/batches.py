"""Batches on a mesh: how they are split, what each process feeds, how host arrays become global ones."""

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
    """The sharding of the arrays of a batch: dimension 0 over the axes of the ``batch`` rule, the rest whole.

    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> tuple(parallel.batch_sharding(AbstractMesh((4, 2, 2), ("data", "fsdp", "tensor"))).spec)
    (('data', 'fsdp'),)

    Raises:
      ConfigError: mesh and rules do not fit together.
    """
    mesh, rules = resolve(mesh, rules)
    placed, _ = assign(rules.table, ("batch",), (0,), mesh.shape)  # 0 divides by everything
    return NamedSharding(mesh, partition(placed))


def shards(sharding: NamedSharding) -> int:
    """Into how many parts dimension 0 is split: batch sizes must be multiples of this.

    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> parallel.shards(parallel.batch_sharding(AbstractMesh((4, 2), ("data", "tensor"))))
    4
    """
    return int(np.prod([sharding.mesh.shape[axis] for axis in _batch_axes(sharding)], dtype=int))


def batch_multiple(mesh: AnyMesh, rules: Rules | str | None = None) -> int:
    """What the layout cuts a batch into: the shards and, where there are stages, their micro-batches on each shard.

    A batch whose size is a multiple of this goes through any model.

    >>> import dataclasses
    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> mesh = AbstractMesh((2, 4), ("data", "stage"))
    >>> rules = dataclasses.replace(parallel.DEFAULT, pipeline=parallel.pipeline.Pipeline(microbatches=12))
    >>> batch_multiple(mesh), batch_multiple(mesh, rules)
    (8, 24)

    Raises:
      ConfigError: mesh and rules do not fit together.
    """
    mesh, rules = resolve(mesh, rules)
    sharding, stages = batch_sharding(mesh, rules), mesh.shape.get("stage", 1)
    if stages == 1:
        return shards(sharding)
    others = math.prod(mesh.shape[axis] for axis in _batch_axes(sharding) if axis != "stage")
    return math.lcm(shards(sharding), others * (rules.pipeline.microbatches or stages))


def check_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Return `batch`, a tree of global arrays or shapes, or say which of them cannot be split.

    Raises:
      ConfigError: a scalar, text, different batch sizes, or a size that is no multiple of the shards.
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
    """Return the global batch `size`, or say what would fit.

    Raises:
      ConfigError: the size is no multiple of the shards, or zero.
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
    """Part `index` of `count` equal parts of each global batch, in order: what one process has to supply."""

    index: int
    count: int


def feed(sharding: NamedSharding, process: int | None = None) -> Feed:
    """Which part of every global batch a process feeds (this process by default).

    Not simply ``process_index`` of ``process_count``: where a mesh has tensor or sequence axes across
    processes, several of them feed the same rows.

    >>> import sapwood.parallel as parallel
    >>> parallel.feed(parallel.batch_sharding(parallel.mesh("data=-1")))
    Feed(index=0, count=1)

    Raises:
      ConfigError: the rows of the processes overlap in part, so that no even split exists; or no device of the mesh
        is the process's.
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
    """Global arrays from this process's part of a batch (see `feed`), split over the devices.

    With one process its part is the whole batch.

    >>> import numpy as np, sapwood.parallel as parallel
    >>> sharding = parallel.batch_sharding(parallel.mesh("data=-1"))
    >>> batch = parallel.put_batch({"image": np.zeros((16, 8, 8))}, sharding)
    >>> batch["image"].shape, batch["image"].sharding == sharding
    ((16, 8, 8), True)

    Raises:
      ConfigError: see `check_batch`.
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
