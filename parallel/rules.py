"""The whole of sharding: a table from logical axis names to mesh axes, and thirty lines that read it."""

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


def _is_row(row: object) -> bool:
    if not (isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str)):
        return False
    names = row[1] if isinstance(row[1], list | tuple) else (row[1] or "",)
    return all(isinstance(name, str) for name in names)


def mesh_axes(target: Target) -> tuple[str, ...]:
    """The mesh axes of a row's second half."""
    return () if target is None else (target,) if isinstance(target, str) else tuple(target)


def _options(rules: "Rules") -> None:
    """A `ConfigError` for what the rules beside the tables cannot be, and would be overlooked or fail far from here."""
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
    """A dimension is split over a mesh axis once."""
    for name in names:
        if names.count(name) > 1:
            once = tuple(dict.fromkeys(names))
            raise ConfigError(
                f"{where} asks for mesh axis {name!r} twice; once is enough: {once[0] if len(once) == 1 else once!r}"
            )


@dataclass(frozen=True)
class Rules:
    """Two ordered tables of rows (logical axis, mesh axis): how arrays are computed, how parameters are stored.

    A row's second half is a mesh axis, a tuple of them, or None for "left whole". Rows are tried from the
    top: a row gives its mesh axes to the dimension of its name if they are in the mesh, not yet used by this
    array, and divide the dimension. The first that fits wins; later rows for the name are its fallbacks; a
    mesh axis is used once per array.

    `table` is for activations and parameters. `stored` continues it for parameters alone: what is sharded
    there is kept in pieces and gathered where it is used (FSDP), so it never shards an activation.

    A parameter without axis names is stored by its largest dimension that mesh axis `unannotated` divides.
    One of fewer than `min_size` elements is left whole: sending it costs more than keeping it. (The layer
    axis of a scanned stack does not count, so that a stack lies as its unrolled twin does.)

    `beside` are mesh axes that split further what is kept beside a parameter, its moments and its running mean,
    over the largest dimension they divide (ZeRO-1, Rajbhandari et al. 2020): the gradient is summed straight into
    these pieces, each device updates its own, and the parameter is gathered again.

    `pipeline` says how a stack of blocks runs where the mesh has the axis "stage". With `strict` a dimension that
    does not divide, or whose mesh axis another dimension of the array took first, is an error and no warning.

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
      ConfigError: a row that is none, or that names a mesh axis twice; another field of the wrong type.
    """

    table: tuple[tuple[str, Target], ...]
    stored: tuple[tuple[str, Target], ...] = ()
    unannotated: str | None = "fsdp"
    min_size: int = 2**14
    beside: tuple[str, ...] = ()
    pipeline: Pipeline = field(default_factory=Pipeline)
    strict: bool = False

    def __post_init__(self):
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
        """What holds for parameters: both tables."""
        return (*self.table, *self.stored)

    def activation(self, axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """The `PartitionSpec` of an activation of `shape` whose dimensions have the logical names `axes`."""
        return partition(assign(self.table, axes, shape, mesh.shape)[0])

    def parameter(self, axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
        """The same for a parameter that is not small."""
        return partition(assign(self.rows, axes, shape, mesh.shape)[0])


class Miss(NamedTuple):
    """A dimension that a rule would shard, were it a multiple of `parts`; `dim` is None where no dimension fits."""

    dim: int | None
    mesh_axis: str
    parts: int


Placed = list[tuple[str, ...]]  # for each dimension, the mesh axes it is split over


def assign(table, axes: Sequence[str | None], shape: Sequence[int], sizes) -> tuple[Placed, list[Miss]]:
    """Read the table from the top: each dimension's mesh axes, and those lost to indivisibility."""
    placed: Placed = [()] * len(shape)
    decided: set[int] = set()
    used: set[str] = set()
    missed: list[Miss] = []
    for name, target in table:
        for dim, axis in enumerate(axes):
            if axis != name or dim in decided:
                continue
            free = [a for a in mesh_axes(target) if sizes.get(a, 1) > 1 and a not in used]
            fit = len(free)
            while fit and shape[dim] % math.prod(sizes[a] for a in free[:fit]):
                fit -= 1
            parts = list(itertools.accumulate((sizes[a] for a in free), operator.mul))
            missed += [Miss(dim, a, n) for a, n in list(zip(free, parts, strict=True))[fit:] if shape[dim] > 1]
            if fit or target is None:
                placed[dim] = tuple(free[:fit])
                decided.add(dim)
                used.update(free[:fit])
    return placed, [miss for miss in dict.fromkeys(missed) if miss.mesh_axis not in used]


def assign_largest(axis: str | None, placed: Placed, shape: Sequence[int], sizes, skip: int) -> list[Miss]:
    """Give `axis` to the largest dimension it divides, in place; the first `skip` dimensions stay."""
    if axis is None or sizes.get(axis, 1) == 1 or any(axis in names for names in placed):
        return []
    fits = [dim for dim in range(skip, len(shape)) if not placed[dim] and shape[dim] % sizes[axis] == 0]
    if not fits:
        return [Miss(None, axis, sizes[axis])]
    placed[max(fits, key=lambda dim: shape[dim])] = (axis,)
    return []


def assign_beside(axes: Sequence[str], placed: Placed, shape: Sequence[int], sizes, skip: int) -> list[Miss]:
    """Give all of `axes` that an array leaves unused to one dimension, in place: the largest that is whole, else the
    largest part of one that is split. Where none divides by them all, the last ones alone: they are the fast links.
    """
    used = set(itertools.chain(*placed))
    free = [a for a in axes if sizes.get(a, 1) > 1 and a not in used]
    left = {dim: shape[dim] // math.prod(sizes[a] for a in placed[dim]) for dim in range(skip, len(shape))}
    for start in range(len(free)):
        fits = [dim for dim, size in left.items() if size % math.prod(sizes[a] for a in free[start:]) == 0]
        if fits:
            best = max(fits, key=lambda dim: (not placed[dim], left[dim]))
            placed[best] = (*placed[best], *free[start:])
            return [Miss(None, a, sizes[a]) for a in free[:start]]
    return [Miss(None, a, sizes[a]) for a in free]


def taken(table, axes: Sequence[str | None], placed: Placed, sizes) -> Iterator[tuple[int, int, str]]:
    """Each dimension left whole because another has the mesh axis of its first row: both, and the axis."""
    rows = dict(reversed(table))  # the first row of each name
    holder = {axis: dim for dim, names in enumerate(placed) for axis in names}
    for dim, name in enumerate(axes):
        wanted = [a for a in mesh_axes(rows.get(name)) if sizes.get(a, 1) > 1]
        if wanted and not placed[dim] and all(a in holder for a in wanted):
            yield dim, holder[wanted[0]], wanted[0]


def partition(placed: Placed) -> PartitionSpec:
    """``[("data", "fsdp"), ("tensor",), ()]`` as ``PartitionSpec(("data", "fsdp"), "tensor", None)``."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in placed))


def describe(mesh: AnyMesh) -> str:
    """A mesh the way `sapwood.mesh` reads it: ``data=4,fsdp=2``."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())
