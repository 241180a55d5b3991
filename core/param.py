"""`Param`: a variable described before it exists. The leaf of every tree that `sw.spec` returns."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Stacked:
    """One leading dimension that stacking (`L.Scan`, `L.Vmap`, `v.stack`) put in front of a variable.

    `depth` is how many path segments lie above the stack, `size` the number of copies, `axis` its logical name.
    """

    depth: int
    size: int
    axis: str | None


@dataclass(frozen=True)
class Param:
    """Shape, dtype, initialiser and logical axis names of one parameter or state entry; no array.

    `shape` and `axes` cover every dimension, the leading `stacked` ones included; `axes` is None where the model
    gave no names. It is no pytree node, so a tree of `Param` has them as its leaves.

    >>> kernel = Param((3, 4), "float32", None, ("embed", "mlp"))
    >>> kernel.size, kernel.nbytes, kernel.struct
    (12, 48, ShapeDtypeStruct(shape=(3, 4), dtype=float32))
    """

    shape: tuple[int, ...]
    dtype: Any
    init: Callable[..., Any] | None
    axes: tuple[str | None, ...] | None
    stacked: tuple[Stacked, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The same as a `jax.ShapeDtypeStruct`, for `jax.eval_shape`, `jax.jit(...).lower` and Orbax."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)
