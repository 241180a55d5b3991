"""Attention without a ring or an all-to-all: input checks, and the choice of the implementation.

`local_attention` chooses between the kernels for TPU and GPU, blocks on a CPU, and XLA's plain form.
`check_and_promote` checks the inputs of every attention function.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.errors import InputError
from sapwood.core.layer import describe
from sapwood.core.target_platform import platform
from sapwood.layers import check_inputs
from sapwood.layers.attentions import cpu_causal, gpu_cudnn, tpu_splash
from sapwood.layers.attentions.blockwise import HIDDEN
from sapwood.layers.masked_values import zero_masked_nonfinite


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    sharding: Any = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """`attention` of checked arrays, by the best implementation for the platform.

    These are JAX's splash kernel on a TPU, cuDNN's kernel on an NVIDIA GPU in half precision, blocks on a CPU, and
    XLA's plain form elsewhere. Except in the kernels, a non-finite key or value affects no earlier query with `causal`,
    and no query at all if `mask` hides it from all.

    Args:
        q, k, v: as `check_and_promote` returns them.
        mask: boolean, broadcasts to `(batch, heads, queries, keys)`.
        causal, scale: as in `attention`.
        sharding: the sharding of q on a mesh, if known. The kernels need one that does not split the length.
        segments: `(batch, length)`, or None.

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> local_attention(jnp.zeros_like(x), x, x, segments=jnp.array([[0, 0, 1]]))[0, :, 0, 0]
    Array([0.5, 0.5, 2. ], dtype=float32)
    """
    if tpu_splash.chosen(q, k, mask, sharding):
        return tpu_splash.splash_attention(q, k, v, causal, scale, sharding, segments)
    if gpu_cudnn.chosen(q, k, mask, segments, sharding):
        return gpu_cudnn.cudnn_attention(q, k, v, causal, scale)
    dtype = q.dtype
    q, k, v = float16_to_float32(q, k, v)
    if mask is not None:
        seen = jnp.any(mask, (1, 2))[:, :, None, None]  # keys that any query may see
        k, v = zero_masked_nonfinite(k, seen), zero_masked_nonfinite(v, seen)
    if not causal:
        return _plain(q, k, v, mask, causal, scale, segments).astype(dtype)
    k, v, late = _until(k, v)
    if mask is None and cpu_causal.pays(q):
        y = cpu_causal.causal_attention(q, k, v, scale, segments)
    else:
        y = _plain(q, k, v, mask, causal, scale, segments)
    return (y + jnp.repeat(late, q.shape[2] // k.shape[2], 2)).astype(dtype)


def _until(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Replace non-finite keys and values by 0, and return a term that makes the queries that see them NaN.

    The term is `(batch, length, kv_heads, 1)`: 0 before the first non-finite position, NaN from there on. A hidden key
    has weight 0, but 0 x inf is NaN. So in a matrix product with the weights it would reach earlier queries and their
    gradient.
    """
    place = lax.broadcasted_iota(jnp.int32, (1, k.shape[1], 1, 1), 1)
    fine = jnp.isfinite(k) & jnp.isfinite(v)
    first = jnp.min(jnp.where(fine, k.shape[1], place), (1, 3), keepdims=True)
    late = jnp.where(place >= first, jnp.inf, 0).astype(v.dtype) * 0  # inf * 0: `jax_debug_nans` rejects a NaN constant
    return zero_masked_nonfinite(k, False), zero_masked_nonfinite(v, False), late


def _plain(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, causal: bool, scale: float | None, segments: Any
) -> jax.Array:
    """XLA's plain form, which holds the scores of all pairs."""
    if segments is not None:
        same = (segments[:, :, None] == segments[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    if q.dtype == jnp.float64:
        return _in_float64(q, k, v, mask, causal, scale)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own formula mixes dtypes
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale)


def _in_float64(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool, scale: float | None
) -> jax.Array:
    """Attention in float64: JAX's own function takes the softmax in float32 for every dtype."""
    k, v = repeat_kv_heads(k, v, q.shape[2], q.shape[2])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        earlier = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
        mask = earlier if mask is None else mask & earlier
    scores = scores if mask is None else jnp.where(mask, scores, HIDDEN)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def check_and_promote(
    who: str, q: Any, k: Any, v: Any, causal: bool, segments: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Check the arrays of an attention and promote q, k and v to one dtype, as `dense` does.

    Returns `(q, k, v, segments)`, with segments in int32 or None. Raises `InputError` if they do not fit together.
    """
    q, k, v = (check_inputs.floating(who, x) for x in (q, k, v))
    q, k, v = (x.astype(jnp.result_type(q, k, v)) for x in (q, k, v))  # JAX's own attention takes only one
    check_inputs.rank(who, q, "batch", "queries", "heads", "head_dim")
    check_inputs.rank(who, k, "batch", "keys", "kv_heads", "head_dim")
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise InputError(
            f"{who} expects q (batch, queries, heads, head_dim), k and v (batch, keys, kv_heads, head_dim) with "
            f"heads a multiple of kv_heads, got q {describe(q)}, k {describe(k)}, v {describe(v)}"
        )
    if causal and q.shape[1] != k.shape[1]:
        raise InputError(
            f"causal attention expects as many queries as keys, got {q.shape[1]} and {k.shape[1]}; give a "
            "mask that says which keys each query may see"
        )
    if segments is None:
        return q, k, v, None
    segments = check_inputs.integer(who, segments)
    if segments.shape != q.shape[:2] or q.shape[1] != k.shape[1]:
        raise InputError(
            f"{who} expects segments (batch, length) of queries and keys that are the same positions, got segments "
            f"{describe(segments)} for q {describe(q)}, k {describe(k)}"
        )
    return q, k, v, segments.astype(jnp.int32)


def float16_to_float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Convert float16 to float32, except on a GPU: only there does XLA sum products of float16 in float32."""
    if arrays[0].dtype == jnp.float16 and platform() not in ("gpu", "cuda", "rocm"):
        return tuple(x.astype(jnp.float32) for x in arrays)
    return arrays


def repeat_kv_heads(k: jax.Array, v: jax.Array, heads: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Repeat the heads of keys and values as few times as lets `shards` split them.

    Each shard of the query heads needs its own key heads.

    >>> x = jnp.ones((1, 5, 2, 8))
    >>> repeat_kv_heads(x, x, heads=8, shards=4)[0].shape
    (1, 5, 4, 8)
    """
    kv_heads = k.shape[2]
    often = next(n for n in range(1, heads + 1) if kv_heads * n % shards == 0 and heads % (kv_heads * n) == 0)
    return (jnp.repeat(k, often, axis=2), jnp.repeat(v, often, axis=2)) if often > 1 else (k, v)
