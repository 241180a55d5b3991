"""Shardings of parameters and state: a `NamedSharding` for every leaf of a spec, before any array exists.

`layout` decides the sharding of one parameter, and `layout_beside` that of its moments. `_each` applies one of them to
a pytree and collects the messages, so that parameters with the same problem share one `ShardingWarning`.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.core.paths import join
from sapwood.parallel.meshes import AnyMesh, with_auto_axes
from sapwood.parallel.rule_tables import resolve, unknown
from sapwood.parallel.rules import (
    DimAxes,
    Rules,
    UnusedAxis,
    assign,
    assign_beside,
    assign_largest,
    axis_conflicts,
    describe,
    partition,
)


class ShardingWarning(UserWarning):
    """An array, or one of its dimensions, is left whole although the rules would shard it."""


def param_shardings(spec: Any, mesh: AnyMesh, rules: Rules | str | None = None) -> Any:
    """A pytree like `spec` with the `NamedSharding` of every parameter.

    Dimensions with logical names follow the rules. In a parameter without names, the largest dimension that the mesh
    axis ``fsdp`` divides is split (`Rules.unannotated`). Small parameters and the layer axes of scanned stacks stay
    whole. A dimension that does not divide stays whole too, with one `ShardingWarning` for all parameters with the same
    axes and sizes.

    Args:
        spec: a pytree of `Param` (from `sapwood.spec`), of arrays or of `jax.ShapeDtypeStruct`. The last two are
            parameters without axis names.
        mesh: the mesh.
        rules: the sharding rules: `Rules`, the name of a table, or None for `DEFAULT`.

    >>> import jax, sapwood.parallel as parallel
    >>> from jax.sharding import AbstractMesh
    >>> mesh = AbstractMesh((8,), ("fsdp",))
    >>> spec = {"up": {"kernel": jax.ShapeDtypeStruct((256, 1024), "float32"),
    ...                "bias": jax.ShapeDtypeStruct((1024,), "float32")}}
    >>> shardings = parallel.param_shardings(spec, mesh)
    >>> tuple(shardings["up"]["kernel"].spec), tuple(shardings["up"]["bias"].spec)
    ((None, 'fsdp'), (None,))

    Raises:
        ConfigError: `mesh` and `rules` do not fit together (see `parallel.rule_tables.resolve`); or, with
            `Rules.strict`, a dimension does not divide.
    """
    mesh, rules = resolve(mesh, rules)
    return _each(spec, mesh, rules, layout)


def moment_shardings(spec: Any, mesh: AnyMesh, rules: Rules | str | None = None) -> Any:
    """Shardings of what is kept beside the parameters: moments, running means and summed gradients.

    Arguments and result are those of `param_shardings`. Each leaf is sharded like its parameter, and split further over
    the mesh axes in `Rules.beside` (ZeRO-1). If those divide no dimension, a `ShardingWarning` says so.

    >>> import jax, sapwood.parallel as parallel
    >>> from jax.sharding import AbstractMesh
    >>> mesh, spec = AbstractMesh((8,), ("data",)), {"kernel": jax.ShapeDtypeStruct((256, 1024), "float32")}
    >>> tuple(parallel.param_shardings(spec, mesh, "zero1")["kernel"].spec)
    (None, None)
    >>> tuple(parallel.moment_shardings(spec, mesh, "zero1")["kernel"].spec)
    (None, 'data')

    Raises:
        ConfigError: `mesh` and `rules` do not fit together; or, with `Rules.strict`, a dimension does not divide.
    """
    mesh, rules = resolve(mesh, rules)
    return _each(spec, mesh, rules, layout_beside)


def _each(spec: Any, mesh: AnyMesh, rules: Rules, layout_of: Callable) -> Any:
    """The sharding of every leaf by `layout_of`. Each deviation from the rules is a warning, or under strict rules a
    `ConfigError`."""
    notes: dict[str, list[str]] = {}
    what = "" if layout_of is layout else "what is kept beside "

    def place(path, leaf) -> NamedSharding:
        placed, missed, axes = layout_of(leaf, mesh, rules)
        said = [*unused_axis_messages(missed, axes, leaf.shape, mesh.shape)]
        if layout_of is layout:
            said += unknown(rules, axes)
            said += conflict_messages(rules, axes, leaf.shape, placed, mesh.shape) if rules.strict else ()
        for text in said:
            notes.setdefault(text, []).append(jax.tree_util.keystr(path, simple=True, separator="/"))
        return NamedSharding(mesh, partition(placed))

    shardings = jax.tree_util.tree_map_with_path(place, spec)
    lines = []
    for text, paths in notes.items():
        more = f" and {len(paths) - 1} more like it" if len(paths) > 1 else ""
        lines.append(f"{what}{paths[0] or join(())}{more}: {text}")
    raise_if_strict(lines, mesh, rules)
    for line in lines:
        warnings.warn(line, ShardingWarning, stacklevel=3)
    return shardings


def raise_if_strict(lines: Sequence[str], mesh: AnyMesh, rules: Rules) -> None:
    """Raise `ConfigError` with these lines if the rules are strict. Otherwise the caller warns."""
    if rules.strict and lines:
        raise ConfigError(
            f"mesh {describe(mesh)}, strict rules: {'; '.join(lines)}. Change those sizes or the mesh, add a row "
            "(name, None) for what is to be whole, or let Rules(strict=False) leave it whole with a warning"
        )


def state_shardings(spec: Any, mesh: AnyMesh) -> Any:
    """A pytree like `spec` in which every leaf is replicated: statistics are global on every mesh."""
    whole = replicated(mesh)
    return jax.tree.map(lambda _: whole, spec)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array that every device holds whole, such as the step, the random key or a metric.

    >>> import sapwood.parallel as parallel
    >>> parallel.replicated(parallel.mesh("data=-1")).is_fully_replicated
    True
    """
    return NamedSharding(with_auto_axes(mesh), PartitionSpec())


def layout(leaf: Any, mesh: AnyMesh, rules: Rules) -> tuple[DimAxes, list[UnusedAxis], tuple[str | None, ...]]:
    """The mesh axes of each dimension of a parameter, the axes that do not divide one, and the logical names."""
    shape = leaf.shape
    stacked = tuple(level.axis for level in getattr(leaf, "stacked", ()))
    named = getattr(leaf, "axes", None)
    axes = tuple(named) if named is not None else stacked + (None,) * (len(shape) - len(stacked))
    if _elements(shape, axes, len(stacked), rules) < rules.min_size:
        # The dimensions of a stack may still be split: a pipeline stage does not need the biases of another stage.
        placed, missed = assign(
            rules.table, (*axes[: len(stacked)], *(None,) * (len(shape) - len(stacked))), shape, mesh.shape
        )
        return placed, missed, axes
    placed, missed = assign(rules.rows, axes, shape, mesh.shape)
    if named is None:
        missed += assign_largest(rules.unannotated, placed, shape, mesh.shape, len(stacked))
    return placed, missed, axes


def _elements(shape: tuple[int, ...], axes: tuple[str | None, ...], stacked: int, rules: Rules) -> int:
    """The number of elements that decides whether a parameter is small. Layer axes do not count: a layer has one entry
    of them."""
    sharded = {name for name, target in rules.rows if target is not None} - {"layers"}
    return math.prod(size for dim, size in enumerate(shape) if dim >= stacked or axes[dim] in sharded)


def layout_beside(leaf: Any, mesh: AnyMesh, rules: Rules) -> tuple[DimAxes, list[UnusedAxis], tuple[str | None, ...]]:
    """`layout` for what is kept beside a parameter. Only the axes of `Rules.beside` are reported as not dividing."""
    placed, _, axes = layout(leaf, mesh, rules)
    stacked = len(getattr(leaf, "stacked", ()))
    if _elements(leaf.shape, axes, stacked, rules) < rules.min_size:
        return placed, [], axes
    return placed, assign_beside(rules.beside, placed, leaf.shape, mesh.shape, stacked), axes


def unused_axis_messages(
    missed: list[UnusedAxis], axes: Sequence, shape: Sequence[int], sizes: Mapping
) -> Iterable[str]:
    """Yield a sentence for each mesh axis that could not be used."""
    for dim, mesh_axis, parts in missed:
        by = f"{mesh_axis}={sizes[mesh_axis]}"
        if dim is None:
            yield f"no dimension of {tuple(shape)} divides by {by}: left whole"
        else:
            size = shape[dim]
            below, above = size - size % parts, size - size % parts + parts
            near = f"{below} or {above} would divide" if below else f"{above} would divide"
            left = "left whole"
            if parts != sizes[mesh_axis]:  # the size may divide by this axis, not by all of the row
                left = f"with the axes before it in its row that makes {parts} parts, so not split over {mesh_axis!r}"
            yield f"dimension {dim} ({axes[dim]!r}, size {size}) does not divide by {by}: {left}; {near}"


def conflict_messages(
    rules: Rules, axes: Sequence, shape: Sequence[int], placed: DimAxes, sizes: Mapping
) -> Iterable[str]:
    """Yield a sentence for each dimension whose mesh axis another dimension of the array has taken."""
    for dim, other, mesh_axis in axis_conflicts(rules.table, axes, placed, sizes):
        yield (
            f"the rows of {axes[other]!r} and {axes[dim]!r} ask for mesh axis {mesh_axis!r} twice: dimension {other} "
            f"(size {shape[other]}) has it, dimension {dim} (size {shape[dim]}) is left whole"
        )
