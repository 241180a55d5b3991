"""The tables of rules by name: which logical axes each way of sharding splits over which mesh axes."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest
from sapwood.parallel.meshes import AXES, AnyMesh, automatic
from sapwood.parallel.rules import Rules, Target, describe, mesh_axes


class Piece(NamedTuple):
    """What one strategy adds to the rules: rows of `table` and of `stored`, `unannotated`, `beside`.

    `axis` is the mesh axis without which it would do nothing.
    """

    axis: str | None
    table: tuple[tuple[str, Target], ...] = ()
    stored: tuple[tuple[str, Target], ...] = ()
    unannotated: str | None = None
    beside: tuple[str, ...] = ()


# Rows are tried in this order, whatever the order in which a name lists them.
PIECES: dict[str, Piece] = {
    # each device has all parameters
    "data": Piece(None),
    "replica": Piece("replica"),
    # parameters are kept in pieces, or what lies beside them is
    "fsdp": Piece(
        "fsdp",
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
        unannotated="fsdp",
    ),
    "zero1": Piece(None, beside=("replica", "data", "stage", "fsdp", "expert", "sequence")),
    # the wide side of a layer: computed in parallel
    "tensor": Piece(
        "tensor",
        (
            ("vocab", "tensor"),
            ("heads", "tensor"),
            ("kv_heads", "tensor"),
            ("attention_heads", "tensor"),  # inside an attention whose length is split: with more axes, all-to-all
            ("mlp", "tensor"),
            ("channels_out", "tensor"),
        ),
    ),
    # what the data has
    "ulysses": Piece("sequence", (("attention_heads", "sequence"), ("length", "sequence"))),
    "sequence": Piece("sequence", (("length", "sequence"),)),
    # what an array is a stack of
    "expert": Piece("expert", (("expert", "expert"),)),
    "pipeline": Piece("stage", (("stage", "stage"), ("layers", "stage"))),
}


BATCH = ("batch", ("replica", "data", "fsdp", "expert", "stage"))  # inside a pipeline a stage has it all


WHOLE = tuple((name, None) for name in ("kv", "layers", "time", "depth", "height", "width"))


def combine(*names: str) -> Rules:
    """The rules of these `PIECES` together: the rows they have for one logical axis become one row."""
    pieces = [piece for name, piece in PIECES.items() if name in names]
    rows: dict[str, dict[str, None]] = {}
    for name, target in (*(row for piece in pieces for row in piece.table), BATCH):
        rows.setdefault(name, {}).update(dict.fromkeys(mesh_axes(target)))
    table = tuple((name, axes[0] if len(axes := tuple(targets)) == 1 else axes) for name, targets in rows.items())
    return Rules(
        (*table, *WHOLE),
        tuple(row for piece in pieces for row in piece.stored),
        unannotated=next((piece.unannotated for piece in pieces if piece.unannotated), None),
        beside=tuple(axis for piece in pieces for axis in piece.beside),
    )


# The default follows the mesh: "data=8" is data parallel, "fsdp=8" is FSDP, "fsdp=2,tensor=4" is both. The others do
# what their name says and no more: "data" keeps all parameters whole, "fsdp" (ZeRO-3) splits no computation but the
# batch, "zero1" keeps the optimizer's state in pieces, "tensor" is the plain Megatron layout (Shoeybi et al. 2019). A
# length split over "sequence" is attended by ring attention (Liu et al. 2023); with "ulysses" its heads are split over
# "sequence" instead, inside attention alone, by an all-to-all (Jacobs et al. 2023).
DEFAULT = combine("fsdp", "tensor", "sequence", "expert", "pipeline")


TABLES: dict[str, Rules] = {"default": DEFAULT, **{name: combine(name) for name in PIECES}}


def table(name: str) -> Rules:
    """The rules of a name in `TABLES`, or of several joined by "+", in any order.

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
        if part not in PIECES:
            where = f" {part!r}" if len(names) > 1 else ""
            near = nearest(part, TABLES if len(names) == 1 else PIECES)
            raise ConfigError(f"rules {name!r}: no such table{where}{near}; there are {LISTED}")
    return combine(*names)


LISTED = f"{', '.join(TABLES)}, and these joined by +, such as fsdp+tensor"


def resolve(mesh: AnyMesh, rules: Rules | str | None) -> tuple[AnyMesh, Rules]:
    """The mesh with Auto axes, and the rules: None is `DEFAULT`, a string is read by `table`.

    Raises:
      ConfigError: an unknown table, one whose mesh axis this mesh has not, a row for a mesh axis that does not
        exist, or a mesh axis that no row names (its devices would all do the same work).
    """
    mesh, given = automatic(mesh), rules
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
    """Raise where a table would do nothing on this mesh: asked for FSDP, one should not get data parallelism."""
    for part in (part.strip() for part in name.split("+")):
        axis = PIECES[part].axis if part in PIECES else None
        if axis is not None and axis not in mesh.axis_names:
            size = math.prod(mesh.shape.values())
            raise ConfigError(
                f"rules {name!r}: {part!r} splits over the mesh axis {axis!r}, which mesh {describe(mesh)} has not; "
                f"a mesh such as {axis}={size} has"
            )


def _remedy(given: Rules | str | None, axis: str, size: int, mesh: AnyMesh) -> str:
    """What makes use of a mesh axis that these rules leave out."""
    part = axis if axis in PIECES else next((name for name, piece in PIECES.items() if piece.axis == axis), None)
    if isinstance(given, str) and part is not None:
        sizes = {**mesh.shape, "data": mesh.shape.get("data", 1) * size}
        other = ",".join(f"{name}={sizes[name]}" for name in AXES if name in sizes and name != axis)
        return f"use rules {f'{given}+{part}'!r}, or mesh {other}"
    return f"add a row such as ('batch', {axis!r}) to the rules, or choose another mesh"


def unknown(rules: Rules, axes: Sequence[str | None]) -> Iterator[str]:
    """The logical names that neither these rules nor the default table know: most likely slips of the pen."""
    known = {name for name, _ in (*rules.rows, *DEFAULT.rows)}
    for name in dict.fromkeys(axes):
        if name is not None and name not in known:
            near = nearest(name, known)
            yield f"no rule knows the logical axis {name!r}{near}: left whole"
