"""`grouped_matmul`: rows sorted by group, each multiplied by the kernel of its group, in one call.

It has three algorithms: blocks of rows on a CPU (`grouped_matmul_cpu`), a Pallas kernel on a TPU, and `lax.ragged_dot`
elsewhere. All share the gradients defined here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core import policy
from sapwood.core.errors import InputError
from sapwood.core.layer import describe
from sapwood.core.target_platform import platform as default_platform
from sapwood.layers import check_inputs
from sapwood.layers.experts import grouped_matmul_cpu
from sapwood.parallel.per_device import is_on_one_device

LEAST, MOST = 8, 256
"""Least and largest number of rows of a block. Smaller blocks mostly fetch kernels; larger ones cache no better."""

TILE = 512
"""Features of a tile of the TPU's kernel, and the largest number of its rows."""


def grouped_matmul(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, *, expected: int | None = None, platform: str | None = None
) -> jax.Array:
    """`x[i] @ kernels[g]` for each row i of x, where the first `sizes[0]` rows are of group 0, the next of group 1, ...

    It is differentiable by x and kernels, in reverse mode, to any order.

    XLA's own `jax.lax.ragged_dot` multiplies every row by every kernel on a CPU, and on a TPU as compiled ahead of
    time. A TPU therefore runs JAX's Pallas kernel "megablox". A CPU runs a loop over blocks of rows of one group each,
    as many as the sizes need: with `n` rows a group on average, blocks have `n / 4` rows (8 to 256), and about
    `1.125 n` rows are multiplied. Other platforms run `ragged_dot`. So does a TPU for dtypes such as float16, and with
    several devices outside of a `jax.shard_map` over the whole mesh.

    Args:
        x: `(rows, features)`, floating. Rows after the last group may hold any value.
        kernels: `(groups, features, out)`.
        sizes: `(groups,)`, integers.
        expected: expected number of rows of all groups together, if x is mostly padding. None expects all rows.
        platform: the platform to compile for. None takes that of the default device.

    Returns:
        `(rows, out)` in the dtype of x. Rows after the last group are zeros.

    Raises:
        InputError: the shapes do not fit together, or a dtype is wrong.

    Gale et al. 2022, "MegaBlocks" (arXiv:2211.15841) has the problem and the idea.

    >>> kernels = jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    >>> grouped_matmul(jnp.ones((5, 1)), kernels, jnp.array([2, 0, 1]))[:, 0]
    Array([  1.,   1., 100.,   0.,   0.], dtype=float32)
    """
    x, kernels = check_inputs.floating("grouped_matmul", x), check_inputs.floating("grouped_matmul", kernels)
    sizes = check_inputs.integer("grouped_matmul", sizes).astype(jnp.int32)
    fits = x.ndim == 2 and kernels.ndim == 3 and x.shape[1] == kernels.shape[1] and sizes.shape == kernels.shape[:1]
    if not fits:
        raise InputError(
            "grouped_matmul expects x (rows, features), kernels (groups, features, out) and sizes (groups,), got "
            f"x {describe(x)}, kernels {describe(kernels)}, sizes {describe(sizes)}"
        )
    block = block_size(x.shape[0] if expected is None else expected, len(kernels))
    return _multiply(_way(platform, x), block, False, x, kernels.astype(x.dtype), sizes)


def _way(platform: str | None, x: jax.Array) -> str:
    """The algorithm for a platform: "blocked", "kernel" or "ragged".

    The compiler cannot split a kernel over devices. So with several devices, "kernel" needs a `shard_map` over the
    mesh.
    """
    way = {"cpu": "blocked", "tpu": "kernel"}.get(platform or default_platform(), "ragged")
    if way == "kernel" and (
        x.dtype not in (jnp.bfloat16, jnp.float32) or (jax.device_count() > 1 and not is_on_one_device())
    ):
        return "ragged"
    return way


def block_size(rows: Any, groups: int) -> int:
    """Rows of a block: the largest power of two up to a quarter of an average group, between `LEAST` and `MOST`.

    >>> block_size(8192, 8), block_size(512, 8), block_size(100, 8)
    (256, 16, 8)
    """
    quarter = rows // (4 * groups) if isinstance(rows, int) else LEAST  # a symbolic size has no value yet
    return min(MOST, max(LEAST, 1 << quarter.bit_length() >> 1))


# Two products whose gradients are each other. `way` is the algorithm: "blocked", "kernel" or "ragged".


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _multiply(way: str, block: int, turned: bool, x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x_g k_g` for the rows of each group g, or `x_g k_g^T` if `turned`. Rows after the last group give zeros."""
    y = {"blocked": grouped_matmul_cpu.multiply, "kernel": _kernel_multiply, "ragged": _ragged_multiply}[way](
        block, turned, x, kernels, sizes
    )
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], y, 0)


def _multiply_forward(way, block, turned, x, kernels, sizes):
    return _multiply(way, block, turned, x, kernels, sizes), (x, kernels, sizes)


def _multiply_backward(way, block, turned, kept, dy):
    x, kernels, sizes = kept
    dx = _multiply(way, block, not turned, dy, kernels, sizes)
    dk: jax.Array = _outer(way, block, dy, x, sizes) if turned else _outer(way, block, x, dy, sizes)
    return dx, dk.astype(kernels.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _outer(way: str, block: int, x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x_g^T y_g` for the rows of each group g: `(groups, features, out)`, in float32 at least."""
    run = {"blocked": grouped_matmul_cpu.outer, "kernel": _kernel_outer, "ragged": _ragged_outer}[way]
    return run(block, x, y, sizes)


def _outer_forward(way, block, x, y, sizes):
    return _outer(way, block, x, y, sizes), (x, y, sizes)


def _outer_backward(way, block, kept, d):
    x, y, sizes = kept
    d = d.astype(x.dtype)
    return _multiply(way, block, True, y, d, sizes), _multiply(way, block, False, x, d, sizes), None


_multiply.defvjp(_multiply_forward, _multiply_backward)
_outer.defvjp(_outer_forward, _outer_backward)


def _ragged_multiply(block, turned, x, kernels, sizes):
    kernels = kernels.swapaxes(1, 2) if turned else kernels
    return lax.ragged_dot(x, kernels, sizes, preferred_element_type=policy.accumulation_dtype(x)).astype(x.dtype)


def _ragged_outer(block, x, y, sizes):
    rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return lax.ragged_dot_general(x, y, sizes, rows, preferred_element_type=policy.accumulation_dtype(x))


def _kernel_multiply(block, turned, x, kernels, sizes, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiles, whole = _tiles(block, x)
    return gmm(whole, kernels, sizes, x.dtype, tiles, transpose_rhs=turned, interpret=interpret)[: x.shape[0]]


def _kernel_outer(block, x, y, sizes, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (tiles, x), (_, y) = _tiles(block, x), _tiles(block, y)
    return tgmm(x.swapaxes(0, 1), y, sizes, policy.accumulation_dtype(x), tiles, interpret=interpret)


def _tiles(block: int, x: jax.Array) -> tuple[tuple[int, int, int], jax.Array]:
    """The tile sizes of the TPU's kernel, and x padded with rows of zeros to a multiple of a tile's rows."""
    rows = max(128, min(TILE, 2 * block))
    return (rows, TILE, TILE), jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))
