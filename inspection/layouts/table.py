"""`Layout`: the arrays on a mesh as a table; and `show`, the layout of a model's parameters.

`rows` and `activation_rows` make the rows from shapes and shardings. `layout` in `training` uses them too.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from sapwood.inspection.layouts.activations import Activation
from sapwood.inspection.layouts.rows import ACTIVATIONS, HEADINGS, KINDS, PARAMETERS, Row, _bytes, _itemsize
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.place_activations import placement
from sapwood.parallel.rule_tables import resolve
from sapwood.parallel.rules import Rules, describe
from sapwood.parallel.shardings import param_shardings


class Layout(NamedTuple):
    """The arrays on a mesh, with their shardings and sizes. It prints as a table; `html` gives a page.

    Attributes:
        mesh: the mesh, which may be a `jax.sharding.AbstractMesh`.
        rows: one `Row` for each array.
        title: the title of the rich table and of the page.
        notes: lines below the table.
    """

    mesh: AnyMesh
    rows: tuple[Row, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes that one device holds, without activations and without arrays in host memory."""
        return sum(row.nbytes for row in self.rows if row.kind != ACTIVATIONS and not row.host)

    def of(self, kind: str) -> tuple[Row, ...]:
        """The rows of a kind, one of `KINDS`."""
        return tuple(row for row in self.rows if row.kind == kind)

    @property
    def totals(self) -> str:
        """The last line of the table: the bytes of one device by kind, those on the host, and those of activations."""
        sizes = {kind: sum(row.nbytes for row in self.of(kind) if not row.host) for kind in KINDS if self.of(kind)}
        most = sizes.pop(ACTIVATIONS, 0)
        parts = ", ".join(f"{kind} {_bytes(size)}" for kind, size in sizes.items())
        host = sum(row.nbytes for row in self.rows if row.host)
        devices = f"each of {self.mesh.size} devices holds" if self.mesh.size > 1 else "the device holds"
        return (
            f"mesh {describe(self.mesh)}: {devices} {_bytes(self.nbytes)} ({parts})"
            + (f", its host {_bytes(host)}" if host else "")
            + (f"; the named activations are {_bytes(most)} where all are kept" if most else "")
        )

    def __str__(self) -> str:
        kinds = [kind for kind in KINDS if self.of(kind)]
        if kinds in ([], [PARAMETERS]):
            body = [row.cells() for row in self.rows]
            last: list = [("", "", "", f"mesh {describe(self.mesh)}", _bytes(self.nbytes))]
        else:
            body = [line for kind in kinds for line in ((f"{kind}:",), *(row.cells() for row in self.of(kind)))]
            last = []
        lines = [HEADINGS, *body, *last]
        widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(len(HEADINGS))]
        table = ["  ".join(map(str.ljust, line, widths[: len(line)])).rstrip() for line in lines]
        return "\n".join([*table, *([] if last else [self.totals]), *self.notes])

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                      caption=Text("\n".join([self.totals, *self.notes])), caption_justify="left")  # fmt: skip
        for k, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if k == 4 else "left", no_wrap=k != 0, overflow="fold")
        colours = {axis: _COLOURS[k % len(_COLOURS)] for k, axis in enumerate(self.mesh.axis_names)}
        for kind in KINDS:
            if self.of(kind):
                table.add_row(Text(kind, style="bold cyan"), end_section=False)
            for row in self.of(kind):
                path, shape, axes, spec, size = row.cells()
                above, slash, name = path.rpartition("/")
                where = Text(spec, style="dim" if spec == "whole" else "")
                for axis, colour in colours.items():
                    where.highlight_words([axis], style=colour)
                table.add_row(Text.assemble(("  " + above + slash, "dim"), name), shape, Text(axes, "dim"), where, size)
        return table

    def show(self) -> None:
        """Print the table to the terminal, in color if the terminal supports it."""
        from rich.console import Console

        Console().print(self)

    def html(self) -> str:
        """The layout as one HTML page that loads no other files. It shows which device holds which slice."""
        from sapwood.inspection.layouts.html_page import html

        return html(self)


_COLOURS = ("green", "yellow", "magenta", "blue", "red", "cyan", "bright_green")


def show(spec: Any, mesh: AnyMesh, rules: Rules | str | None = None) -> Layout:
    """The layout of parameters on a mesh: path, shape, axis names, sharding, and the bytes one device holds.

    `spec` is a pytree of `Param`, arrays or `jax.ShapeDtypeStruct`. `mesh` may be a `jax.sharding.AbstractMesh`, so the
    layout on a pod can be shown on a laptop. `rules` are `Rules`, the name of a rule table, or None for the default
    rules. `layout` shows a whole training state and the activations.

    >>> from jax.sharding import AbstractMesh
    >>> import jax, sapwood.parallel as parallel
    >>> spec = {"kernel": jax.ShapeDtypeStruct((1024, 4096), "float32"),
    ...         "bias": jax.ShapeDtypeStruct((4096,), "float32")}
    >>> show(spec, AbstractMesh((4, 16), ("data", "fsdp")))
    path    shape        axes  sharding             bytes per device
    bias    4096         -     whole                16.0 KiB
    kernel  1024 × 4096  -     · × fsdp             1.0 MiB
                               mesh data=4,fsdp=16  1.0 MiB

    Raises:
      ConfigError: mesh and rules do not fit together.
    """
    mesh, rules = resolve(mesh, rules)
    return Layout(mesh, tuple(rows(PARAMETERS, spec, param_shardings(spec, mesh, rules))))


def rows(kind: str, tree: Any, shardings: Any, spec: Any = None) -> Iterator[Row]:
    """The rows of a pytree of parameters, shapes or arrays.

    Args:
        kind: the kind of the rows, one of `KINDS`.
        tree: the pytree.
        shardings: a pytree with the sharding of each leaf.
        spec: parameters that give the leaves of `tree` their logical axes; None if the leaves have their own. A leaf
            takes the axes of the parameter that has its shape and whose path is the end of the leaf's path.
    """
    known = _leaves(tree if spec is None else spec)
    named = {path: leaf for path, leaf in known if getattr(leaf, "axes", None) is not None}
    for (path, leaf), sharding in zip(_leaves(tree), jax.tree.leaves(shardings), strict=True):
        names = path.split("/")
        mirrored = (named.get("/".join(names[k:])) for k in range(len(names)))
        of = next((one for one in mirrored if one is not None and one.shape == leaf.shape), None)
        nbytes = math.prod(sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype)
        host = sharding.memory_kind not in (None, "device") and "host" in sharding.memory_kind
        yield Row(path, tuple(leaf.shape), None if of is None else of.axes, sharding.spec, nbytes, kind,
                  str(leaf.dtype), host=host)  # fmt: skip


def activation_rows(found: Iterable[Activation], mesh: AnyMesh, rules: Rules | str | None = None) -> Iterator[Row]:
    """The rows of activations (from `activations`), sharded on a mesh by the rules."""
    place = placement(mesh, rules)
    for path, axes, shape, dtype, copies in found:
        sharding = place(axes, shape)
        assert sharding is not None
        nbytes = math.prod(sharding.shard_shape(shape)) * _itemsize(dtype) * copies
        yield Row(path, shape, axes, sharding.spec, nbytes, ACTIVATIONS, str(dtype), copies)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in found]
