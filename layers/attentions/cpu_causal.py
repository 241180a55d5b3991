"""Causal attention on a CPU: blocks of queries, each against the keys up to its last query.

XLA has no fused attention for CPUs. The plain form computes the scores of all pairs of positions and then hides half of
them, in steps too large for the caches. Blocks skip most of the hidden half.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.policy import accumulation_dtype
from sapwood.core.target_platform import platform
from sapwood.layers.attentions.blockwise import HIDDEN

LEAST, MOST = 64, 8
"""Least number of queries in a block, and largest number of blocks, since each block takes more time to compile."""


def pays(q: jax.Array) -> bool:
    """True if `causal_attention` should be used for these queries: on a CPU, with two or more blocks.

    >>> pays(jnp.ones((1, 32, 2, 8)))
    False
    """
    return platform() == "cpu" and isinstance(q.shape[1], int) and q.shape[1] >= 2 * LEAST


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None = None, segments: jax.Array | None = None
) -> jax.Array:
    """`attention(q, k, v, causal=True, scale=scale, segments=segments)`, with the same result up to rounding.

    Args:
        q: `(batch, length, heads, head_dim)`.
        k, v: `(batch, length, kv_heads, head_dim)`.
        scale: factor of the scores, 1 / sqrt(head_dim) by default.
        segments: `(batch, length)`, or None.

    Returns:
        An array of the shape of q.

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> causal_attention(jnp.zeros_like(x), x, x)[0, :, 0, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    (batch, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    groups = heads // kv_heads
    q = (q * (head_dim**-0.5 if scale is None else scale)).astype(q.dtype)
    # To (batch, kv_heads, groups, length, head_dim). Every size is written out: -1 fails for an empty batch.
    q = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    size = max(LEAST, -(-length // MOST))
    blocks = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        rows = q[:, :, :, begin:end].reshape(batch, kv_heads, groups * (end - begin), head_dim)
        y = _block(rows, k[:, :, :end], v[:, :, :end], begin, segments)
        blocks.append(y.reshape(batch, kv_heads, groups, end - begin, head_dim))
    return jnp.concatenate(blocks, 3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _block(q: jax.Array, k: jax.Array, v: jax.Array, begin: int, segments: jax.Array | None) -> jax.Array:
    """Queries from position `begin` on, group after group, against all keys up to the last of these queries."""
    rows, end = q.shape[2], k.shape[2]
    scores = lax.dot_general(q, k, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=accumulation_dtype(q))
    position = begin + lax.broadcasted_iota(jnp.int32, (1, 1, rows, end), 2) % (end - begin)
    hidden = lax.broadcasted_iota(jnp.int32, (1, 1, rows, end), 3) > position
    if segments is not None:
        own = jnp.tile(segments[:, begin:end], (1, rows // (end - begin)))
        hidden = hidden | (own[:, :, None] != segments[:, None, :end])[:, None]
    scores = _at_most(scores, jnp.where(hidden, HIDDEN, jnp.inf))
    return lax.dot_general(jax.nn.softmax(scores).astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))))


@jax.custom_jvp
def _at_most(scores: jax.Array, bound: jax.Array) -> jax.Array:
    """The minimum of both, which hides scores: `bound` is `HIDDEN` or inf.

    A sum with `HIDDEN` would not hide scores that overflowed. `jnp.where` takes a tenth longer.
    """
    return jnp.minimum(scores, bound)


@_at_most.defjvp
def _at_most_jvp(primals, tangents):
    """The derivative of a sum, which takes no pass of its own. A hidden score has weight 0, so no gradient anyway."""
    return _at_most(*primals), tangents[0]
