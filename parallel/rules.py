"""Sharding rules: ordered tables from logical axis names to mesh axes, and the functions that read them.

`assign` decides the mesh axes of each dimension of one array; nearly all of sharding is in it. `assign_largest` adds an
axis to parameters without axis names, and `assign_beside` adds axes for moments and gradients. Their results are
`DimAxes`, which `partition` turns into a `PartitionSpec`. The tables that Sapwood ships are in `rule_tables`.
"""

import itertools
import math
import numbers
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.pipeline.settings import Pipeline

Target = str | tuple[str, ...] | None
"""The second half of a row: a mesh axis, several, or None for "left whole"."""


def _is_row(row: object) -> bool:
    if not (isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str)):
        return False
    names = row[1] if isinstance(row[1], list | tuple) else (row[1] or "",)
    return all(isinstance(name, str) for name in names)


def mesh_axes(target: Target) -> tuple[str, ...]:
    """The mesh axes of a row's target, as a tuple."""
    return () if target is None else (target,) if isinstance(target, str) else tuple(target)


def _options(rules: "Rules") -> None:
    """Raise `ConfigError` if a field other than the tables has a wrong type, which would fail later or not at all."""
    beside = rules.beside if isinstance(rules.beside, list | tuple) else (rules.beside or "",)
    number = isinstance(rules.min_size, numbers.Real) and not isinstance(rules.min_size, bool)
    fits = {
        "unannotated": (isinstance(rules.unannotated, str | None), 'a mesh axis such as "fsdp", or None'),
        "min_size": (number, "a number of elements"),
        "beside": (all(isinstance(name, str) for name in beside), "a tuple of mesh axes"),
        "pipeline": (isinstance(rules.pipeline, Pipeline), 'a Pipeline, such as Pipeline(schedule="1f1b")'),
        "strict": (isinstance(rules.strict, bool), "True or False"),
    }
    for name, (right, expected) in fits.items():
        if not right:
            raise ConfigError(f"Rules({name}={getattr(rules, name)!r}): expected {expected}")


def _once(where: str, names: Sequence[str]) -> None:
    """Raise `ConfigError` if a mesh axis occurs twice in `names`; `where` says in which field."""
    for name in names:
        if names.count(name) > 1:
            once = tuple(dict.fromkeys(names))
            raise ConfigError(
                f"{where} asks for mesh axis {name!r} twice; once is enough: {once[0] if len(once) == 1 else once!r}"
            )


@dataclass(frozen=True)
class Rules:
    """Two ordered tables of rows (logical axis, mesh axis): how arrays are computed, and how parameters are stored.

    The second half of a row is a mesh axis, a tuple of mesh axes, or None for "left whole". Rows are tried from the
    top. A row gives its mesh axes to the dimension with its name if these axes are in the mesh, are not yet used by
    this array, and divide the dimension. The first row that fits wins; later rows for the same name are fallbacks. An
    array uses each mesh axis at most once.

    Attributes:
        table: rows for activations and parameters.
        stored: rows that follow `table` for parameters only. A parameter that they split is stored in shards and
            gathered where it is used (FSDP). They never shard an activation.
        unannotated: the mesh axis for parameters without axis names: it splits the largest dimension that it divides.
            None leaves them whole.
        min_size: a parameter with fewer elements is left whole, because sending it costs more than storing it. The
            layer axis of a scanned stack does not count, so a stack is sharded like its unrolled layers.
        beside: mesh axes that further split what is kept beside a parameter, its moments and its running mean, along
            the largest dimension that they divide (ZeRO-1, Rajbhandari et al. 2020). The gradient is summed directly
            into these shards, each device updates its own shard, and the parameter is gathered again.
        pipeline: how a stack of blocks runs if the mesh has the axis "stage".
        strict: if True, a `ConfigError` replaces the warnings about dimensions that do not divide, unknown logical
            names and unused mesh axes. A dimension whose mesh axis another dimension of the array took first is an
            error, too.

    >>> from jax.sharding import AbstractMesh
    >>> import sapwood.parallel as parallel
    >>> mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    >>> tuple(parallel.DEFAULT.parameter(("embed", "mlp"), (512, 2048), mesh))
    ('fsdp', 'tensor')
    >>> tuple(parallel.DEFAULT.activation(("batch", "length", "embed"), (8, 128, 512), mesh))
    ('fsdp', None, None)

    Your own rules are rows in front of others:

    >>> import dataclasses
    >>> rules = dataclasses.replace(parallel.DEFAULT, table=(("embed", "tensor"), *parallel.DEFAULT.table))

    Raises:
        ConfigError: a row has a wrong form or names a mesh axis twice; or another field has a wrong type.
    """

    table: tuple[tuple[str, Target], ...]
    stored: tuple[tuple[str, Target], ...] = ()
    unannotated: str | None = "fsdp"
    min_size: int = 2**14
    beside: tuple[str, ...] = ()
    pipeline: Pipeline = field(default_factory=Pipeline)
    strict: bool = False

    def __post_init__(self) -> None:
        for which in ("table", "stored"):
            rows = getattr(self, which)
            if not isinstance(rows, list | tuple):
                raise ConfigError(f"Rules.{which}: expected a tuple of rows (logical axis, mesh axis), got {rows!r}")
            for row in rows:
                if not _is_row(row):
                    what = "(logical axis, mesh axis or tuple of them or None)"
                    raise ConfigError(f"Rules.{which}: {row!r} is no row; expected {what}")
                _once(f"Rules.{which}: row {tuple(row)!r}", mesh_axes(row[1]))
            fixed = tuple((name, tuple(t) if isinstance(t, list) else t) for name, t in rows)
            object.__setattr__(self, which, fixed)
        _options(self)
        object.__setattr__(self, "beside", mesh_axes(self.beside))
        _once("Rules.beside", self.beside)

    @property
    def rows(self) -> tuple[tuple[str, Target], ...]:
        """The rows for parameters: `table`, then `stored`."""
        return (*self.table, *self.stored)

    def activation(self, axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """The `PartitionSpec` of an activation of `shape` whose dimensions have the logical names `axes`."""
        return partition(assign(self.table, axes, shape, mesh.shape)[0])

    def parameter(self, axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """The `PartitionSpec` of a parameter, which is taken to have at least `min_size` elements."""
        return partition(assign(self.rows, axes, shape, mesh.shape)[0])


class UnusedAxis(NamedTuple):
    """A dimension that a rule would split over a mesh axis if its size were a multiple of `parts`.

    `dim` is None if the axis may split any dimension, and none of them divides.
    """

    dim: int | None
    mesh_axis: str
    parts: int


DimAxes = list[tuple[str, ...]]  # for each dimension, the mesh axes it is split over


def assign(table, axes: Sequence[str | None], shape: Sequence[int], sizes) -> tuple[DimAxes, list[UnusedAxis]]:
    """Read the rows of a table from the top: the mesh axes of each dimension, and the axes that do not divide one.

    Args:
        table: the rows.
        axes: the logical name of each dimension, or None.
        shape: the shape of the array.
        sizes: the size of each mesh axis, by its name.
    """
    placed: DimAxes = [()] * len(shape)
    decided: set[int] = set()
    used: set[str] = set()
    missed: list[UnusedAxis] = []
    for name, target in table:
        for dim, axis in enumerate(axes):
            if axis != name or dim in decided:
                continue
            free = [a for a in mesh_axes(target) if sizes.get(a, 1) > 1 and a not in used]
            fit = len(free)
            while fit and shape[dim] % math.prod(sizes[a] for a in free[:fit]):
                fit -= 1
            parts = list(itertools.accumulate((sizes[a] for a in free), operator.mul))
            missed += [UnusedAxis(dim, a, n) for a, n in list(zip(free, parts, strict=True))[fit:] if shape[dim] > 1]
            if fit or target is None:
                placed[dim] = tuple(free[:fit])
                decided.add(dim)
                used.update(free[:fit])
    return placed, [miss for miss in dict.fromkeys(missed) if miss.mesh_axis not in used]


def assign_largest(axis: str | None, placed: DimAxes, shape: Sequence[int], sizes, skip: int) -> list[UnusedAxis]:
    """Give a mesh axis to the largest dimension that it divides, after the first `skip` ones. Changes `placed`.

    The result holds a `UnusedAxis` if there is no such dimension.
    """
    if axis is None or sizes.get(axis, 1) == 1 or any(axis in names for names in placed):
        return []
    fits = [dim for dim in range(skip, len(shape)) if not placed[dim] and shape[dim] % sizes[axis] == 0]
    if not fits:
        return [UnusedAxis(None, axis, sizes[axis])]
    placed[max(fits, key=lambda dim: shape[dim])] = (axis,)
    return []


def assign_beside(axes: Sequence[str], placed: DimAxes, shape: Sequence[int], sizes, skip: int) -> list[UnusedAxis]:
    """Give all mesh axes among `axes` that an array does not use to one of its dimensions. Changes `placed`.

    That is the largest whole dimension that they divide, else the split dimension with the largest shard. If they
    divide none, the first axes are dropped until the rest does: the last axes have the fastest links. The result holds
    a `UnusedAxis` for each dropped axis. The first `skip` dimensions are left out.
    """
    used = set(itertools.chain(*placed))
    free = [a for a in axes if sizes.get(a, 1) > 1 and a not in used]
    left = {dim: shape[dim] // math.prod(sizes[a] for a in placed[dim]) for dim in range(skip, len(shape))}
    for start in range(len(free)):
        fits = [dim for dim, size in left.items() if size % math.prod(sizes[a] for a in free[start:]) == 0]
        if fits:
            best = max(fits, key=lambda dim: (not placed[dim], left[dim]))
            placed[best] = (*placed[best], *free[start:])
            return [UnusedAxis(None, a, sizes[a]) for a in free[:start]]
    return [UnusedAxis(None, a, sizes[a]) for a in free]


def axis_conflicts(table, axes: Sequence[str | None], placed: DimAxes, sizes) -> Iterator[tuple[int, int, str]]:
    """Yield each dimension that is whole because other dimensions have the mesh axes of its first row.

    The entries are the dimension, the other dimension, and the mesh axis.
    """
    rows = dict(reversed(table))  # the first row of each name
    holder = {axis: dim for dim, names in enumerate(placed) for axis in names}
    for dim, name in enumerate(axes):
        wanted = [a for a in mesh_axes(rows.get(name)) if sizes.get(a, 1) > 1]
        if wanted and not placed[dim] and all(a in holder for a in wanted):
            yield dim, holder[wanted[0]], wanted[0]


def partition(placed: DimAxes) -> PartitionSpec:
    """Turn ``[("data", "fsdp"), ("tensor",), ()]`` into ``PartitionSpec(("data", "fsdp"), "tensor", None)``."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in placed))


def describe(mesh: AnyMesh) -> str:
    """A mesh as the text that `sapwood.mesh` reads: ``data=4,fsdp=2``."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())
