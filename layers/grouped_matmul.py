"""`grouped_matmul`: rows sorted by group, each multiplied by the kernel of its group, in one call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.errors import InputError
from sapwood.core.layer import describe
from sapwood.layers import expect

LEAST, MOST = 8, 256
"""Rows of a block, at least and at most: smaller ones only fetch kernels, larger ones fill no cache better."""


def grouped_matmul(x: jax.Array, kernels: jax.Array, sizes: jax.Array, *, expected: int | None = None) -> jax.Array:
    """`x[i] @ kernels[g]` for each row i of x, where the first `sizes[0]` rows are of group 0, the next of group 1, ...

    Takes x `(rows, features)`, kernels `(groups, features, out)` and integer sizes `(groups,)`, gives `(rows, out)` in
    the dtype of x. Rows behind the last group give zeros, whatever they hold. `expected` is how many rows the groups
    will have together, where x is mostly such padding; by default all. Differentiable by x and kernels, in reverse
    mode and as often as one likes. Raises `InputError` for shapes that do not fit together.

    On a TPU or GPU it is `jax.lax.ragged_dot`. That one multiplies every row by every kernel on a CPU; there, a loop
    goes over blocks of rows of one group each, and does no more blocks than the sizes ask for: with `n` rows a group on
    average and blocks of `n / 4` (8 to 256), about `1.125 n`.

    Gale et al. 2022, "MegaBlocks" (arXiv:2211.15841) has the problem and the idea.

    >>> kernels = jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    >>> grouped_matmul(jnp.ones((5, 1)), kernels, jnp.array([2, 0, 1]))[:, 0]
    Array([  1.,   1., 100.,   0.,   0.], dtype=float32)
    """
    x, kernels = expect.floating("grouped_matmul", x), expect.floating("grouped_matmul", kernels)
    sizes = expect.integer("grouped_matmul", sizes).astype(jnp.int32)
    fits = x.ndim == 2 and kernels.ndim == 3 and x.shape[1] == kernels.shape[1] and sizes.shape == kernels.shape[:1]
    if not fits:
        raise InputError(
            "grouped_matmul expects x (rows, features), kernels (groups, features, out) and sizes (groups,), got "
            f"x {describe(x)}, kernels {describe(kernels)}, sizes {describe(sizes)}"
        )
    return _multiply(_block(x.shape[0] if expected is None else expected, len(kernels)), x, kernels, sizes)


def _block(rows: Any, groups: int) -> int:
    """Rows of a block: the power of two that is a quarter of an average group or just below.

    >>> _block(8192, 8), _block(512, 8), _block(100, 8)
    (256, 16, 8)
    """
    quarter = rows // (4 * groups) if isinstance(rows, int) else LEAST  # a symbolic size has no number yet
    return min(MOST, max(LEAST, 1 << quarter.bit_length() >> 1))


# Three products, each the gradient of another: y = x k and dk = x^T dy, row by row with the kernel of its group.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(block: int, x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    blocked = functools.partial(_blocked_multiply, block)
    y = lax.platform_dependent(x, kernels, sizes, cpu=blocked, default=_ragged_multiply)
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], y, 0)


def _multiply_forward(block, x, kernels, sizes):
    return _multiply(block, x, kernels, sizes), (x, kernels, sizes)


def _multiply_backward(block, kept, dy):
    x, kernels, sizes = kept
    return _multiply(block, dy, kernels.swapaxes(1, 2), sizes), _outer(block, x, dy, sizes).astype(kernels.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outer(block: int, x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x_g^T y_g` for the rows of each group g: `(groups, features, out)`, in float32 at least."""
    blocked = functools.partial(_blocked_outer, block)
    return lax.platform_dependent(x, y, sizes, cpu=blocked, default=_ragged_outer)


def _outer_forward(block, x, y, sizes):
    return _outer(block, x, y, sizes), (x, y, sizes)


def _outer_backward(block, kept, d):
    x, y, sizes = kept
    dx = _multiply(block, y, d.swapaxes(1, 2).astype(y.dtype), sizes)
    return dx.astype(x.dtype), _multiply(block, x, d.astype(x.dtype), sizes).astype(y.dtype), None


_multiply.defvjp(_multiply_forward, _multiply_backward)
_outer.defvjp(_outer_forward, _outer_backward)


def _wide(x: jax.Array) -> Any:
    """The dtype sums are made in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _ragged_multiply(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, kernels.astype(x.dtype), sizes, preferred_element_type=_wide(x)).astype(x.dtype)


def _ragged_outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return lax.ragged_dot_general(x, y.astype(x.dtype), sizes, rows, preferred_element_type=_wide(x))


def blocks(sizes: jax.Array, block: int, rows: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks that cover the groups: how many, and for each its group and first row.

    >>> count, group, first = blocks(jnp.array([3, 0, 5]), 4, 8)
    >>> int(count), group[:3], first[:3]
    (3, Array([0, 2, 2], dtype=int32), Array([0, 3, 7], dtype=int32))
    """
    most = (rows + len(sizes) * (block - 1)) // block  # however the rows fall
    each = -(-sizes // block)
    ends = jnp.cumsum(each)
    index = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), len(sizes) - 1).astype(jnp.int32)
    first = (jnp.cumsum(sizes) - sizes)[group] + (index - (ends - each)[group]) * block
    return ends[-1], group, first.astype(jnp.int32)


def _blocked_multiply(block: int, x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """A block reaches over the end of its group; what it writes there the next group's block writes again, rightly."""
    rows, out = x.shape[0], kernels.shape[2]
    count, group, first = blocks(sizes, block, rows)
    x = jnp.pad(x, ((0, block), (0, 0)))

    def step(i, y):
        kernel = lax.dynamic_index_in_dim(kernels, group[i], keepdims=False)
        part = lax.dynamic_slice_in_dim(x, first[i], block)
        product = jnp.matmul(part, kernel.astype(x.dtype), preferred_element_type=_wide(x)).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(y, product, first[i], 0)

    return lax.fori_loop(0, count, step, jnp.zeros((rows + block, out), x.dtype))[:rows]


def _blocked_outer(block: int, x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    groups, ends = len(sizes), jnp.cumsum(sizes)
    count, group, first = blocks(sizes, block, x.shape[0])
    x, y = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, y))

    def step(i, total):
        left, right = (lax.dynamic_slice_in_dim(a, first[i], block) for a in (x, y))
        own = first[i] + jnp.arange(block) < ends[group[i]]
        left, right = (jnp.where(own[:, None], a, 0) for a in (left, right))  # both: 0 x inf is no 0
        product = jnp.matmul(left.T, right.astype(x.dtype), preferred_element_type=_wide(x))
        before = lax.dynamic_index_in_dim(total, group[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + product, group[i], 0)

    return lax.fori_loop(0, count, step, jnp.zeros((groups, x.shape[1], y.shape[1]), _wide(x)))
