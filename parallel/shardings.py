"""Where parameters and state live: a `NamedSharding` for every leaf of a spec, before any array exists."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.paths import join
from sapwood.parallel.mesh import AnyMesh, automatic
from sapwood.parallel.rules import Miss, Placed, Rules, assign, assign_largest, partition, resolve, unknown


class ShardingWarning(UserWarning):
    """An array is left whole, in part or entirely, where the rules meant to shard it."""


def param_shardings(spec: Any, mesh: AnyMesh, rules: Rules | str | None = None) -> Any:
    """A tree like `spec` with the `NamedSharding` of every parameter.

    `spec` holds `Param` (from `sapwood.spec`); arrays and `jax.ShapeDtypeStruct` count as parameters without
    axis names. Named dimensions follow the rules. Without names the largest dimension that ``fsdp`` divides
    is sharded. Small parameters and the layer axes of scanned stacks stay whole, and so does what does not
    divide, with one `ShardingWarning` for all parameters of the same axes and sizes.

    >>> import jax, sapwood.parallel as parallel
    >>> from jax.sharding import AbstractMesh
    >>> mesh = AbstractMesh((8,), ("fsdp",))
    >>> spec = {"up": {"kernel": jax.ShapeDtypeStruct((256, 1024), "float32"),
    ...                "bias": jax.ShapeDtypeStruct((1024,), "float32")}}
    >>> shardings = parallel.param_shardings(spec, mesh)
    >>> tuple(shardings["up"]["kernel"].spec), tuple(shardings["up"]["bias"].spec)
    ((None, 'fsdp'), (None,))

    Raises:
      ConfigError: mesh and rules do not fit together (see `parallel.rules.resolve`).
    """
    mesh, rules = resolve(mesh, rules)
    notes: dict[str, list[str]] = {}

    def place(path, leaf) -> NamedSharding:
        placed, missed, axes = layout(leaf, mesh, rules)
        for text in (*lost(missed, axes, leaf.shape, mesh.shape), *unknown(rules, axes)):
            notes.setdefault(text, []).append(jax.tree_util.keystr(path, simple=True, separator="/"))
        return NamedSharding(mesh, partition(placed))

    shardings = jax.tree_util.tree_map_with_path(place, spec)
    for text, paths in notes.items():
        more = f" and {len(paths) - 1} more like it" if len(paths) > 1 else ""
        warnings.warn(f"{paths[0] or join(())}{more}: {text}", ShardingWarning, stacklevel=2)
    return shardings


def state_shardings(spec: Any, mesh: AnyMesh) -> Any:
    """A tree like `spec` in which every leaf is whole on every device: statistics are global on any mesh."""
    whole = replicated(mesh)
    return jax.tree.map(lambda _: whole, spec)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of what every device holds whole: the step, the random key, metrics.

    >>> import sapwood.parallel as parallel
    >>> parallel.replicated(parallel.mesh("data=-1")).is_fully_replicated
    True
    """
    return NamedSharding(automatic(mesh), PartitionSpec())


def layout(leaf: Any, mesh: AnyMesh, rules: Rules) -> tuple[Placed, list[Miss], tuple[str | None, ...]]:
    """Mesh axes of each dimension of a parameter, what was lost to indivisibility, and the names read."""
    shape = leaf.shape
    stacked = tuple(level.axis for level in getattr(leaf, "stacked", ()))
    named = getattr(leaf, "axes", None)
    axes = tuple(named) if named is not None else stacked + (None,) * (len(shape) - len(stacked))
    if _elements(shape, axes, len(stacked), rules) < rules.min_size:
        return [()] * len(shape), [], axes
    placed, missed = assign(rules.rows, axes, shape, mesh.shape)
    if named is None:
        missed += assign_largest(rules.unannotated, placed, shape, mesh.shape, len(stacked))
    return placed, missed, axes


def _elements(shape: tuple[int, ...], axes: tuple[str | None, ...], stacked: int, rules: Rules) -> int:
    """Elements that decide whether a parameter is small: layer axes, which never shard, do not count."""
    sharded = {name for name, target in rules.rows if target is not None}
    return math.prod(size for dim, size in enumerate(shape) if dim >= stacked or axes[dim] in sharded)


def lost(missed: list[Miss], axes: Sequence, shape: Sequence[int], sizes: Mapping) -> Iterable[str]:
    """One sentence for every mesh axis that could not be used."""
    for dim, mesh_axis in missed:
        by = f"{mesh_axis}={sizes[mesh_axis]}"
        if dim is None:
            yield f"no dimension of {tuple(shape)} divides by {by}: left whole"
        else:
            yield f"dimension {dim} ({axes[dim]!r}, size {shape[dim]}) does not divide by {by}: left whole"
