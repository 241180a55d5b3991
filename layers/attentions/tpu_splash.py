"""Splash attention: attention on a TPU as one Pallas kernel, which never holds the (length x length) logits.

The kernel loops over blocks of keys with an online softmax, skips the blocks that a causal mask hides, and recomputes
the probabilities for the gradient. The compiler cannot split a kernel over devices, so on a mesh it runs in a
`jax.shard_map`. `local_attention` is its plain version, and calls it where `chosen` is true.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.parallel.per_device import is_on_one_device, per_device, platform
from sapwood.parallel.place_activations import split_over

LANES = 128
"""The width of a TPU's vector registers: blocks are multiples of it."""

BLOCK = 512
"""Largest number of queries and of keys in one step of the kernel, as in MaxText."""


def chosen(q: jax.Array, k: jax.Array, mask: jax.Array | None, sharding: Any = None) -> bool:
    """True if the kernel should be used: a TPU, no mask, lengths in blocks, neither length nor head_dim split.

    `sharding` is that of q on a mesh, whose devices then are those we compile for. Without a sharding the kernel is
    used on a single device, and inside a `jax.shard_map` over the whole mesh. The dtype must be bfloat16 or float32.

    >>> x = jnp.ones((1, 256, 2, 128))
    >>> chosen(x, x, None) == (jax.default_backend() == "tpu" and jax.device_count() == 1)
    True
    """
    if (
        platform(getattr(sharding, "mesh", None)) != "tpu"
        or mask is not None
        or q.dtype not in (jnp.bfloat16, jnp.float32)
    ):
        return False
    if not all(isinstance(n, int) and n % LANES == 0 for n in (q.shape[1], k.shape[1])):  # no symbolic lengths
        return False
    if sharding is None:
        return jax.device_count() == 1 or is_on_one_device()
    return isinstance(sharding, NamedSharding) and not split_over(sharding, 1) and not split_over(sharding, 3)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool = False,
    scale: float | None = None,
    sharding: NamedSharding | None = None,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` without a mask, by JAX's splash kernel.

    Args:
        q: `(batch, queries, heads, head_dim)`.
        k, v: `(batch, keys, kv_heads, head_dim)`. The numbers of queries and of keys are multiples of 128.
        causal: whether query i sees only the keys 0 to i.
        scale: factor of the scores, 1 / sqrt(head_dim) by default.
        sharding: the sharding of q, which splits only the batch and the heads. None runs the kernel on one device.
        segments: int32 `(batch, length)`, or None.
        interpret: whether to run the kernel's steps as plain operations, on any platform, as tests do.

    Returns:
        An array of the shape of q.

    Dao et al. 2022, "FlashAttention" (arXiv:2205.14135); jax.experimental.pallas.ops.tpu.splash_attention.

    >>> x = jnp.ones((1, 128, 2, 128))
    >>> jax.eval_shape(lambda x: splash_attention(x, x, x, causal=True, interpret=True), x).shape
    (1, 128, 2, 128)
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel takes no scale

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        run = _kernel(q.shape[1], q.shape[2], k.shape[2], causal, interpret)
        return jax.vmap(run)(q, k, v, _segment_ids(segments)).swapaxes(1, 2)

    if sharding is None:
        return local(q, k, v, segments)
    mesh = sharding.mesh
    batch, heads = split_over(sharding, 0), split_over(sharding, 2)
    if k.shape[2] % math.prod(mesh.shape[axis] for axis in heads):  # each shard of queries needs its own keys
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    split = PartitionSpec(batch, None, heads, None)
    specs = (split, split, split, None if segments is None else PartitionSpec(batch, None))
    return per_device(local, mesh, specs, split)(q, k, v, segments)


def _segment_ids(segments: jax.Array | None) -> Any:
    if segments is None:
        return None
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel.SegmentIds(q=segments, kv=segments)


def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> Any:
    """JAX's kernel for arrays `(heads, length, head_dim)` of one example."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    one = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    rows, columns = _block(queries), _block(keys)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([one((queries, keys))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _block(length: int) -> int:
    """The largest block that divides a length.

    >>> _block(2048), _block(640), _block(384)
    (512, 128, 384)
    """
    return max(size for size in range(LANES, BLOCK + 1, LANES) if length % size == 0)
