"""`show`: a layout as a table, before anything is allocated."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from sapwood.core.param import Param
from sapwood.parallel.mesh import AnyMesh
from sapwood.parallel.rules import Rules, describe, resolve
from sapwood.parallel.shardings import param_shardings


class Row(NamedTuple):
    """One parameter of a `Layout`; `nbytes` is what one device holds of it."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    spec: PartitionSpec
    nbytes: int


class Layout(NamedTuple):
    """What `show` returns: rows to read in code, and a table when printed."""

    mesh: AnyMesh
    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters on one device."""
        return sum(row.nbytes for row in self.rows)

    def __str__(self) -> str:
        head = ("path", "shape", "axes", "sharding", "bytes per device")
        body = [(r.path, _tuple(r.shape), _tuple(r.axes), _spec(r.spec), _bytes(r.nbytes)) for r in self.rows]
        table = [head, *body, ("", "", "", f"mesh {describe(self.mesh)}", _bytes(self.nbytes))]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)

    __repr__ = __str__


def show(spec: Any, mesh: AnyMesh, rules: Rules | str | None = None) -> Layout:
    """The layout of parameters on a mesh: path, shape, axis names, sharding, and the bytes one device holds.

    `mesh` may be a `jax.sharding.AbstractMesh`, so that a pod can be looked at from a laptop.

    >>> from jax.sharding import AbstractMesh
    >>> import jax, sapwood.parallel as parallel
    >>> spec = {"kernel": jax.ShapeDtypeStruct((1024, 4096), "float32"),
    ...         "bias": jax.ShapeDtypeStruct((4096,), "float32")}
    >>> parallel.show(spec, AbstractMesh((4, 16), ("data", "fsdp")))
    path    shape        axes  sharding             bytes per device
    bias    4096         -     whole                16.0 KiB
    kernel  1024 × 4096  -     · × fsdp             1.0 MiB
                               mesh data=4,fsdp=16  1.0 MiB

    Raises:
      ConfigError: mesh and rules do not fit together.
    """
    mesh, rules = resolve(mesh, rules)
    shardings = jax.tree.leaves(param_shardings(spec, mesh, rules))
    rows = []
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(spec), shardings, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = leaf.axes if isinstance(leaf, Param) else None
        nbytes = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        rows.append(Row(name, tuple(leaf.shape), axes, sharding.spec, nbytes))
    return Layout(mesh, tuple(rows))


def _tuple(items: tuple | None) -> str:
    """A shape or axis names in few characters."""
    if items is None:
        return "-"
    return " × ".join("·" if item is None else str(item) for item in items) or "scalar"


def _spec(spec: PartitionSpec) -> str:
    if all(entry is None for entry in spec):
        return "whole"
    return " × ".join("·" if e is None else e if isinstance(e, str) else "+".join(e) for e in spec)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
