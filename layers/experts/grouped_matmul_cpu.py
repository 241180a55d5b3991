"""Grouped matmul on a CPU: a loop over blocks of rows, each of one group.

The number of iterations depends on the sizes of the groups, so padding after the last group costs little.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.policy import accumulation_dtype


def multiply(block: int, turned: bool, x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x_g k_g` for the rows of each group g, or `x_g k_g^T` if `turned`. Rows of no group hold any value.

    A block may extend past the end of its group. The next group's first block then overwrites those rows.
    """
    rows, out = x.shape[0], kernels.shape[1 if turned else 2]
    count, group, first = blocks(sizes, block, rows)
    x = jnp.pad(x, ((0, block), (0, 0)))

    def step(i, y):
        kernel = lax.dynamic_index_in_dim(kernels, group[i], keepdims=False)
        part = lax.dynamic_slice_in_dim(x, first[i], block)
        product = _dot(part, kernel, 1, 1 if turned else 0).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(y, product, first[i], 0)

    return lax.fori_loop(0, count, step, jnp.zeros((rows + block, out), x.dtype))[:rows]


def outer(block: int, x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x_g^T y_g` for each group g, summed block after block."""
    ends = jnp.cumsum(sizes)
    count, group, first = blocks(sizes, block, x.shape[0])
    x, y = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, y))

    def step(i, total):
        own = first[i] + jnp.arange(block) < ends[group[i]]
        parts = (lax.dynamic_slice_in_dim(a, first[i], block) for a in (x, y))
        left, right = (jnp.where(own[:, None], part, 0) for part in parts)  # mask both: 0 x inf is NaN
        before = lax.dynamic_index_in_dim(total, group[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + _dot(left, right, 0, 0), group[i], 0)

    return lax.fori_loop(0, count, step, jnp.zeros((len(sizes), x.shape[1], y.shape[1]), accumulation_dtype(x)))


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=accumulation_dtype(a))


def blocks(sizes: jax.Array, block: int, rows: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks that cover the groups: their number, and the group and first row of each.

    >>> count, group, first = blocks(jnp.array([3, 0, 5]), 4, 8)
    >>> int(count), group[:3], first[:3]
    (3, Array([0, 2, 2], dtype=int32), Array([0, 3, 7], dtype=int32))
    """
    most = (rows + len(sizes) * (block - 1)) // block  # an upper bound for any sizes
    each = -(-sizes // block)
    ends = jnp.cumsum(each)
    index = jnp.arange(most or 1, dtype=jnp.int32)  # 1 at least: JAX traces unused loops; symbolic sizes have no max
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), len(sizes) - 1).astype(jnp.int32)
    first = (jnp.cumsum(sizes) - sizes)[group] + (index - (ends - each)[group]) * block
    return ends[-1], group, first.astype(jnp.int32)
