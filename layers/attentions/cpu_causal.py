"""Causal attention on a CPU: in blocks of queries, each against the keys that it may see and no others.

XLA has no fused attention for CPUs. The plain form works out every pair of positions and then hides half of them, in
steps too large for the caches; blocks leave out most of what is hidden.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.platform import platform
from sapwood.core.policy import wide
from sapwood.layers.attentions.blockwise import HIDDEN

LEAST, MOST = 64, 8
"""Queries of a block, at least; blocks, at most: each is more to compile."""


def pays(q: jax.Array) -> bool:
    """Whether `causal_attention` serves for these queries: on a CPU, where there are two blocks or more.

    >>> pays(jnp.ones((1, 32, 2, 8)))
    False
    """
    return platform() == "cpu" and isinstance(q.shape[1], int) and q.shape[1] >= 2 * LEAST


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None = None, segments: jax.Array | None = None
) -> jax.Array:
    """`attention(q, k, v, causal=True, scale=scale, segments=segments)`, the same numbers but for rounding.

    Takes q `(batch, length, heads, head_dim)`, k and v `(batch, length, kv_heads, head_dim)`, segments `(batch,
    length)`; gives the shape of q.

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> causal_attention(jnp.zeros_like(x), x, x)[0, :, 0, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    (batch, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    groups = heads // kv_heads
    q = (q * (head_dim**-0.5 if scale is None else scale)).astype(q.dtype)
    # With all sizes said, as -1 has none where the batch is empty: (batch, kv_heads, groups, length, head_dim).
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
    """Queries from position ``begin`` on, group after group, against all keys up to the last of them."""
    rows, end = q.shape[2], k.shape[2]
    scores = lax.dot_general(q, k, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=wide(q))
    position = begin + lax.broadcasted_iota(jnp.int32, (1, 1, rows, end), 2) % (end - begin)
    hidden = lax.broadcasted_iota(jnp.int32, (1, 1, rows, end), 3) > position
    if segments is not None:
        own = jnp.tile(segments[:, begin:end], (1, rows // (end - begin)))
        hidden = hidden | (own[:, :, None] != segments[:, None, :end])[:, None]
    scores = _at_most(scores, jnp.where(hidden, HIDDEN, jnp.inf))
    return lax.dot_general(jax.nn.softmax(scores).astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))))


@jax.custom_jvp
def _at_most(scores: jax.Array, bound: jax.Array) -> jax.Array:
    """Scores that overflowed are hidden, too, as a sum with `HIDDEN` would not. `jnp.where` takes a tenth longer."""
    return jnp.minimum(scores, bound)


@_at_most.defjvp
def _at_most_jvp(primals, tangents):
    """That of a sum, with no pass of its own: a hidden score has weight 0, and so no gradient anyway."""
    return _at_most(*primals), tangents[0]
