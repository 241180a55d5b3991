"""Named tables of sharding rules: which logical axes each strategy splits over which mesh axes.

A strategy, such as "fsdp" or "tensor", is a `Strategy` in `STRATEGIES`. `rules_of` makes `Rules` of several strategies,
`table` reads names such as "fsdp+tensor", and `resolve` checks rules against a mesh. `DEFAULT` combines all strategies
that have a mesh axis of their own, except "replica" and "ulysses".
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest
from sapwood.parallel.meshes import AXES, AnyMesh, with_auto_axes
from sapwood.parallel.rules import Rules, Target, describe, mesh_axes


class Strategy(NamedTuple):
    """What one sharding strategy adds to the fields of `Rules`.

    Attributes:
        axis: the mesh axis without which the strategy does nothing; None if there is no such axis.
        table: rows for `Rules.table`.
        stored: rows for `Rules.stored`.
        unannotated: the mesh axis for `Rules.unannotated`, or None.
        beside: mesh axes for `Rules.beside`.
    """

    axis: str | None
    table: tuple[tuple[str, Target], ...] = ()
    stored: tuple[tuple[str, Target], ...] = ()
    unannotated: str | None = None
    beside: tuple[str, ...] = ()


# Rows are tried in the order of this dict. The order in a name such as "zero1+tensor" has no effect.
STRATEGIES: dict[str, Strategy] = {
    # every device holds all parameters
    "data": Strategy(None),
    "replica": Strategy("replica"),
    # parameters are stored in shards (fsdp), or only gradients, moments and running means are (zero1)
    "fsdp": Strategy(
        "fsdp",
        stored=(
            # the dimension of a kernel that "tensor" does not split
            ("embed", "fsdp"),
            ("channels_in", "fsdp"),
            # fallback: there is no such dimension, or it does not divide
            ("channels_out", "fsdp"),
            ("mlp", "fsdp"),
            ("heads", "fsdp"),
            ("vocab", "fsdp"),
        ),
        unannotated="fsdp",
    ),
    "zero1": Strategy(None, beside=("replica", "data", "stage", "fsdp", "expert", "sequence")),
    # the wide dimension of a layer is computed in parallel
    "tensor": Strategy(
        "tensor",
        (
            ("vocab", "tensor"),
            ("heads", "tensor"),
            ("kv_heads", "tensor"),
            ("attention_heads", "tensor"),  # heads inside attention; with the axes of the length too, all-to-all
            ("mlp", "tensor"),
            ("channels_out", "tensor"),
        ),
    ),
    # dimensions of the data
    "ulysses": Strategy("sequence", (("attention_heads", "sequence"), ("length", "sequence"))),
    "sequence": Strategy("sequence", (("length", "sequence"),)),
    # the dimension along which an array stacks experts or layers
    "expert": Strategy("expert", (("expert", "expert"),)),
    "pipeline": Strategy("stage", (("stage", "stage"), ("layers", "stage"))),
}


BATCH = ("batch", ("replica", "data", "fsdp", "expert", "stage"))  # inside a pipeline, stages do not split it


UNSPLIT_ROWS = tuple((name, None) for name in ("kv", "layers", "time", "depth", "height", "width"))
"""Rows for logical axes that stay whole unless an earlier row splits them. A row also makes the name a known one."""


def rules_of(*names: str) -> Rules:
    """The rules of several strategies of `STRATEGIES`. Rows for the same logical axis become one row of `table`."""
    pieces = [piece for name, piece in STRATEGIES.items() if name in names]
    rows: dict[str, dict[str, None]] = {}
    for name, target in (*(row for piece in pieces for row in piece.table), BATCH):
        rows.setdefault(name, {}).update(dict.fromkeys(mesh_axes(target)))
    table = tuple((name, axes[0] if len(axes := tuple(targets)) == 1 else axes) for name, targets in rows.items())
    return Rules(
        (*table, *UNSPLIT_ROWS),
        tuple(row for piece in pieces for row in piece.stored),
        unannotated=next((piece.unannotated for piece in pieces if piece.unannotated), None),
        beside=tuple(axis for piece in pieces for axis in piece.beside),
    )


# The default follows the mesh: "data=8" is data parallel, "fsdp=8" is FSDP, "fsdp=2,tensor=4" is FSDP and tensor
# parallel. Each other table has one strategy: "data" replicates all parameters; "fsdp" (ZeRO-3) splits no computation
# except over the batch; "zero1" shards the optimizer state; "tensor" is the plain Megatron layout (Shoeybi et al.
# 2019). If the length is split over "sequence", attention is ring attention (Liu et al. 2023). With "ulysses", an
# all-to-all splits the heads over "sequence" in place of the length, only inside attention (Jacobs et al. 2023).
DEFAULT = rules_of("fsdp", "tensor", "sequence", "expert", "pipeline")


TABLES: dict[str, Rules] = {"default": DEFAULT, **{name: rules_of(name) for name in STRATEGIES}}


def table(name: str) -> Rules:
    """The rules called `name`: a name of `TABLES`, or names of strategies joined by "+" in any order.

    >>> table("zero1+tensor") == table("tensor+zero1")
    True
    >>> import dataclasses
    >>> strict = dataclasses.replace(table("fsdp+tensor"), strict=True)

    Raises:
        ConfigError: there is no such table.
    """
    if name in TABLES:
        return TABLES[name]
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in STRATEGIES:
            where = f" {part!r}" if len(names) > 1 else ""
            near = nearest(part, TABLES if len(names) == 1 else STRATEGIES)
            raise ConfigError(f"rules {name!r}: no such table{where}{near}; there are {LISTED}")
    return rules_of(*names)


LISTED = f"{', '.join(TABLES)}, and these joined by +, such as fsdp+tensor"


def resolve(mesh: AnyMesh, rules: Rules | str | None) -> tuple[AnyMesh, Rules]:
    """The mesh with Auto axes, and the rules as `Rules`, checked against each other.

    `rules` is `Rules`, a string for `table`, or None for `DEFAULT`.

    Raises:
        ConfigError: the table is unknown; the mesh lacks the axis of a named strategy; a row names a mesh axis that
            does not exist; or no row names a mesh axis of size above 1 (its devices would all do the same work).
    """
    mesh, given = with_auto_axes(mesh), rules
    if rules is None:
        rules = DEFAULT
    elif isinstance(rules, str):
        rules = table(rules)
    elif not isinstance(rules, Rules):
        raise ConfigError(f"rules: expected Rules or one of {LISTED}; got {type(rules).__name__}")
    named = {axis for _, target in rules.rows for axis in mesh_axes(target)} | {
        *mesh_axes(rules.unannotated),
        *rules.beside,
    }
    known = {*AXES, *mesh.axis_names}
    for axis in sorted(named - known):
        near = nearest(axis, known)
        rows = [row for row in rules.rows if axis in mesh_axes(row[1])]
        where = f" (row {rows[0]!r})" if rows else ""
        raise ConfigError(
            f"rules: there is no mesh axis {axis!r}{near}{where}; this mesh is {describe(mesh)}, and other axes "
            f"are {', '.join(name for name in AXES if name not in mesh.axis_names)}"
        )
    if isinstance(given, str):
        _has_axes(given, mesh)
    computed = {axis for _, target in rules.rows for axis in mesh_axes(target)} | {*mesh_axes(rules.unannotated)}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in computed:
            raise ConfigError(
                f"mesh {describe(mesh)}: no rule uses axis {axis!r}, so its {size} devices would all do the "
                f"same work; {_remedy(given, axis, size, mesh)}"
            )
    return mesh, rules


def _has_axes(name: str, mesh: AnyMesh) -> None:
    """Raise `ConfigError` if a named strategy would do nothing on this mesh.

    Otherwise a user who asks for FSDP would get plain data parallelism.
    """
    for part in (part.strip() for part in name.split("+")):
        axis = STRATEGIES[part].axis if part in STRATEGIES else None
        if axis is not None and axis not in mesh.axis_names:
            size = math.prod(mesh.shape.values())
            raise ConfigError(
                f"rules {name!r}: {part!r} splits over the mesh axis {axis!r}, which mesh {describe(mesh)} has not; "
                f"a mesh such as {axis}={size} has"
            )


def _remedy(given: Rules | str | None, axis: str, size: int, mesh: AnyMesh) -> str:
    """Advice for an error message: how to use a mesh axis that no rule names."""
    part = (
        axis if axis in STRATEGIES else next((name for name, piece in STRATEGIES.items() if piece.axis == axis), None)
    )
    if isinstance(given, str) and part is not None:
        sizes = {**mesh.shape, "data": mesh.shape.get("data", 1) * size}
        other = ",".join(f"{name}={sizes[name]}" for name in AXES if name in sizes and name != axis)
        return f"use rules {f'{given}+{part}'!r}, or mesh {other}"
    return f"add a row such as ('batch', {axis!r}) to the rules, or choose another mesh"


def unknown(rules: Rules, axes: Sequence[str | None]) -> Iterator[str]:
    """Yield a sentence for each logical name that is in neither these rules nor `DEFAULT`: probably a typing error."""
    known = {name for name, _ in (*rules.rows, *DEFAULT.rows)}
    for name in dict.fromkeys(axes):
        if name is not None and name not in known:
            near = nearest(name, known)
            yield f"no rule knows the logical axis {name!r}{near}: left whole"
