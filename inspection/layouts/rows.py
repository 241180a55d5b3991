"""The rows of a `Layout`, the table of the arrays on a mesh.

Each row describes one array: its axes, its sharding, and its bytes on one device. `Row.cells` formats a row as text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.place_activations import split_over

PARAMETERS, OPTIMIZER, STATE, BATCH, ACTIVATIONS = "parameters", "optimizer", "state", "batch", "activations"


KINDS = (PARAMETERS, OPTIMIZER, STATE, BATCH, ACTIVATIONS)


HEADINGS = ("path", "shape", "axes", "sharding", "bytes per device")


class Row(NamedTuple):
    """One array of a `Layout`.

    Attributes:
        path: its path, joined by "/".
        shape: its global shape. If there are several `copies`, this is the shape of one.
        axes: the logical axis of each dimension; None if they are unknown.
        spec: its `PartitionSpec` on the mesh.
        nbytes: the bytes that one device holds, of all `copies` together.
        kind: one of `KINDS`.
        dtype: the name of its dtype.
        copies: how many copies a stack of layers makes of an activation; 1 for every other array.
        host: True if it lies in the memory of the device's host.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    spec: PartitionSpec
    nbytes: int
    kind: str = PARAMETERS
    dtype: str = "float32"
    copies: int = 1
    host: bool = False

    def cells(self) -> tuple[str, ...]:
        """The texts of the row in the columns `HEADINGS`."""
        shape = _tuple(self.shape) + (f", {self.copies} times" if self.copies > 1 else "")
        return self.path, shape, _tuple(self.axes), _spec(self.spec) + " on host" * self.host, _bytes(self.nbytes)


def split(row: Row, mesh: AnyMesh) -> Sequence[tuple[str, ...]]:
    """The mesh axes that each dimension of a row is sharded over."""
    sharding = NamedSharding(mesh, row.spec)
    return [split_over(sharding, dim) for dim in range(len(row.shape))]


def _itemsize(dtype: Any) -> int:
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size * 4
    return np.dtype(dtype).itemsize


def _tuple(items: tuple | None) -> str:
    """A shape or axis names as text: "8 × 4"."""
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
