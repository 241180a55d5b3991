"""`matmul`: the last dimensions of x against the first of a kernel, in the form that each platform multiplies best."""

import math

import jax
import jax.numpy as jnp

from sapwood.core.platform import platform


def matmul(x: jax.Array, kernel: jax.Array, dims: int = 1, *, split: bool = False) -> jax.Array:
    """`jnp.tensordot(x, kernel, dims)`: the last `dims` dimensions of x against the first of the kernel.

    Takes x `(..., *inner)` and kernel `(*inner, *outer)`, gives `(..., *outer)`. `split` says that x is split over a
    mesh, whose dimensions are then left as they are.

    On a CPU it is one product of two matrices. With more dimensions XLA transposes an operand of the kernel's gradient
    `x^T dy`, and computes what leads up to it again in that order: a sixth of the training step of a small
    transformer.

    >>> matmul(jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))).shape
    (2, 3, 5, 6)
    """
    lead, outer = x.shape[: x.ndim - dims], kernel.shape[dims:]
    if platform() != "cpu" or split or (x.ndim == 2 and kernel.ndim == 2):
        return jnp.tensordot(x, kernel, dims) if dims > 1 or kernel.ndim > 2 else x @ kernel
    inner = math.prod(kernel.shape[:dims])
    rows, columns = x.reshape(math.prod(lead), inner), kernel.reshape(inner, math.prod(outer))
    return (rows @ columns).reshape(*lead, *outer)
