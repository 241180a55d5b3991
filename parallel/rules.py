"""The whole of sharding: a table from logical axis names to mesh axes, and thirty lines that read it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jax.sharding import PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.core.paths import nearest
from sapwood.parallel.mesh import AXES, AnyMesh, automatic

Target = str | tuple[str, ...] | None


def _is_row(row: object) -> bool:
    if not (isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str)):
        return False
    names = row[1] if isinstance(row[1], list | tuple) else (row[1] or "",)
    return all(isinstance(name, str) for name in names)


def _names(target: Target) -> tuple[str, ...]:
    return () if target is None else (target,) if isinstance(target, str) else target


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
      ConfigError: a row that is none.
    """

    table: tuple[tuple[str, Target], ...]
    stored: tuple[tuple[str, Target], ...] = ()
    unannotated: str | None = "fsdp"
    min_size: int = 2**14

    def __post_init__(self):
        for field in ("table", "stored"):
            rows = getattr(self, field)
            for row in rows:
                if not _is_row(row):
                    what = "(logical axis, mesh axis or tuple of them or None)"
                    raise ConfigError(f"Rules.{field}: {row!r} is no row; expected {what}")
            fixed = tuple((name, tuple(t) if isinstance(t, list) else t) for name, t in rows)
            object.__setattr__(self, field, fixed)

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


DEFAULT = Rules(
    table=(
        # what an array is a stack of
        ("expert", "expert"),
        ("stage", "stage"),
        # what the data has
        ("batch", ("replica", "data", "fsdp", "expert")),
        ("length", "sequence"),
        # the wide side of a layer: computed in parallel
        ("vocab", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("attention_heads", "tensor"),  # the heads inside an attention whose length is split: with more, all-to-all
        ("mlp", "tensor"),
        ("channels_out", "tensor"),
        # left whole
        ("kv", None),
        ("layers", None),
        ("time", None),
        ("depth", None),
        ("height", None),
        ("width", None),
    ),
    stored=(
        # the other side of a layer
        ("embed", "fsdp"),
        ("channels_in", "fsdp"),
        # where there is no other side, or it does not divide
        ("channels_out", "fsdp"),
        ("mlp", "fsdp"),
        ("heads", "fsdp"),
        ("vocab", "fsdp"),
    ),
)

# The default follows the mesh: "data=8" is data parallel, "fsdp=8" is FSDP, "fsdp=2,tensor=4" is both. The others
# leave something out, whatever the mesh: "data" keeps all parameters whole, "fsdp" splits no computation but the
# batch, "tensor" is the plain Megatron layout (Shoeybi et al. 2019). A length split over "sequence" is attended by ring
# attention (Liu et al. 2023); with "ulysses" its heads are split over "sequence" instead, inside attention alone, by an
# all-to-all (Jacobs et al. 2023).
TABLES: dict[str, Rules] = {
    "default": DEFAULT,
    "data": Rules(tuple(row for row in DEFAULT.table if row[0] in ("batch", "length")), unannotated=None),
    "fsdp": Rules(tuple(row for row in DEFAULT.table if row[1] != "tensor"), DEFAULT.stored),
    "tensor": Rules(DEFAULT.table, unannotated=None),
    "ulysses": Rules((("attention_heads", ("tensor", "sequence")), *DEFAULT.table), DEFAULT.stored),
}


class Miss(NamedTuple):
    """A dimension that a rule would have sharded, had it divided; `dim` is None where no dimension did."""

    dim: int | None
    mesh_axis: str


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
            free = [a for a in _names(target) if sizes.get(a, 1) > 1 and a not in used]
            fit = len(free)
            while fit and shape[dim] % math.prod(sizes[a] for a in free[:fit]):
                fit -= 1
            missed += [Miss(dim, a) for a in free[fit:] if shape[dim] > 1]
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
        return [Miss(None, axis)]
    placed[max(fits, key=lambda dim: shape[dim])] = (axis,)
    return []


def partition(placed: Placed) -> PartitionSpec:
    """``[("data", "fsdp"), ("tensor",), ()]`` as ``PartitionSpec(("data", "fsdp"), "tensor", None)``."""
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in placed))


def resolve(mesh: AnyMesh, rules: Rules | str | None) -> tuple[AnyMesh, Rules]:
    """The mesh with Auto axes, and the rules: None is `DEFAULT`, a string names one of `TABLES`.

    Raises:
      ConfigError: an unknown table, a row for a mesh axis that does not exist, or a mesh axis that no
        row names (its devices would all do the same work).
    """
    mesh = automatic(mesh)
    if rules is None:
        rules = DEFAULT
    elif isinstance(rules, str):
        if rules not in TABLES:
            near = nearest(rules, TABLES)
            raise ConfigError(f"rules {rules!r}: no such table{near}; there are {', '.join(TABLES)}")
        rules = TABLES[rules]
    elif not isinstance(rules, Rules):
        raise ConfigError(f"rules: expected Rules or one of {', '.join(TABLES)}; got {type(rules).__name__}")
    named = {axis for _, target in rules.rows for axis in _names(target)} | {*_names(rules.unannotated)}
    known = {*AXES, *mesh.axis_names}
    for axis in sorted(named - known):
        near = nearest(axis, known)
        raise ConfigError(f"rules: there is no mesh axis {axis!r}{near}; this mesh is {describe(mesh)}")
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in named:
            raise ConfigError(
                f"mesh {describe(mesh)}: no rule uses axis {axis!r}, so its {size} devices would all do the "
                f"same work; add a row such as ('batch', {axis!r}) to the rules, or choose another mesh"
            )
    return mesh, rules


def unknown(rules: Rules, axes: Sequence[str | None]) -> Iterator[str]:
    """The logical names that neither these rules nor the default table know: most likely slips of the pen."""
    known = {name for name, _ in (*rules.rows, *DEFAULT.rows)}
    for name in dict.fromkeys(axes):
        if name is not None and name not in known:
            near = nearest(name, known)
            yield f"no rule knows the logical axis {name!r}{near}: left whole"


def describe(mesh: AnyMesh) -> str:
    """A mesh the way `sapwood.mesh` reads it: ``data=4,fsdp=2``."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())
