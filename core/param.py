"""`Param`: the description of a variable: shape, dtype, initializer, axes. `sw.spec` returns trees of `Param`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Stacked:
    """One leading dimension that stacking (`L.Scan`, `L.Vmap`, `v.stack`) adds to a variable.

    `depth` is the number of path segments above the stack, `size` the number of copies, `axis` its logical name.
    """

    depth: int
    size: int
    axis: str | None


@dataclass(frozen=True)
class Param:
    """Shape, dtype, initializer and logical axis names of one parameter or state entry. It holds no array.

    A `Param` is no pytree node, so the leaves of a tree of `Param` are the `Param` themselves.

    Args:
        shape: the whole shape, stacked dimensions first.
        dtype: the dtype it is stored in.
        init: ``init(key, shape, dtype)`` makes the first value of one copy.
        axes: logical axis names, one or None for each dimension of `shape`; None if the model gave no names.
        stacked: the dimensions that stacking added, outermost first.

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
        """Shape and dtype as a `jax.ShapeDtypeStruct`, for `jax.eval_shape`, `jax.jit(...).lower` and Orbax."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)
