"""`matmul`: `jnp.tensordot` of x and a kernel, in the form that is fastest on each platform.

`dense` and the projections of attention call it.
"""

import math

import jax
import jax.numpy as jnp

from sapwood.core.target_platform import platform


def matmul(x: jax.Array, kernel: jax.Array, dims: int = 1, *, split: bool = False) -> jax.Array:
    """`jnp.tensordot(x, kernel, dims)`: contract the last `dims` dimensions of x with the first `dims` of the kernel.

    On a CPU the arrays are reshaped, so that it is one product of two matrices. With more dimensions XLA transposes an
    operand of the kernel's gradient `x^T dy`, and computes the inputs of that operand again in transposed order. This
    took a sixth of the training step of a small transformer.

    Args:
        x: `(..., *inner)`.
        kernel: `(*inner, *outer)`.
        dims: number of dimensions in `inner`.
        split: whether x is split over a mesh; its dimensions are then not reshaped.

    Returns:
        `(..., *outer)`.

    >>> matmul(jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))).shape
    (2, 3, 5, 6)
    """
    lead, outer = x.shape[: x.ndim - dims], kernel.shape[dims:]
    if platform() != "cpu" or split or (x.ndim == 2 and kernel.ndim == 2):
        return jnp.tensordot(x, kernel, dims) if dims > 1 or kernel.ndim > 2 else x @ kernel
    inner = math.prod(kernel.shape[:dims])
    rows, columns = x.reshape(math.prod(lead), inner), kernel.reshape(inner, math.prod(outer))
    return (rows @ columns).reshape(*lead, *outer)
