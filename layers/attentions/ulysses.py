"""All-to-all attention (DeepSpeed-Ulysses): the split of the length becomes a split of the heads, and back.

Between two all-to-alls each device has the whole length of some of the heads, so any attention for one device can run
there. This sends less than a ring and needs no loop. But the devices must divide the heads, and each holds as much
memory as attention on one device does at the full length.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from sapwood.core.errors import InputError
from sapwood.layers.attentions.one_device import check_and_promote, local_attention, repeat_kv_heads
from sapwood.layers.attentions.ring import divides, over_mesh
from sapwood.parallel.place_activations import activation_sharding, shards, split_over
from sapwood.parallel.rules import describe


def chosen(v: Any, q: jax.Array, k: jax.Array, sharding: NamedSharding | None) -> bool:
    """True if the rules of the cursor's run split the heads inside attention over the axes that split the length.

    The rules do so by a row for "attention_heads", as in the table "ulysses":
    `(("attention_heads", ("tensor", "sequence")), ...)`. Heads that do not divide are left to ring attention, with a
    `ShardingWarning`.
    """
    length = split_over(sharding, 1)
    if not length or k.shape[1] % shards(sharding, 1):
        return False
    heads = activation_sharding(v, jax.ShapeDtypeStruct(q.shape[2:3], q.dtype), "attention_heads")
    return set(length) <= set(split_over(heads, 0))


def ulysses_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool = False,
    scale: float | None = None,
    sharding: NamedSharding | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """`attention(q, k, v, causal=causal, scale=scale, segments=segments)` with the length split over devices.

    Args:
        q: `(batch, queries, heads, head_dim)`.
        k, v: `(batch, keys, kv_heads, head_dim)`. Key heads that do not divide are repeated.
        causal: whether query i sees only the keys 0 to i.
        scale: factor of the scores, 1 / sqrt(head_dim) by default.
        sharding: the sharding of q. An all-to-all over the mesh axes of its second dimension splits the heads instead.
            These axes, together with those that already split the heads, must divide the heads. None is attention on
            one device.
        segments: integers `(batch, length)`, or None.

    Returns:
        An array of the shape of q.

    Raises:
        InputError: the devices do not divide the lengths or the heads, or the shapes do not fit together.

    Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv:2309.14509).

    >>> import jax.numpy as jnp, sapwood as sw
    >>> from jax.sharding import PartitionSpec
    >>> mesh = sw.mesh("sequence=-1")
    >>> x = jnp.ones((1, 16, 8, 4))
    >>> sharding = NamedSharding(mesh, PartitionSpec(None, "sequence", None, None))
    >>> jax.jit(lambda x: ulysses_attention(x, x, x, sharding=sharding))(x).shape
    (1, 16, 8, 4)
    """
    q, k, v, segments = check_and_promote("ulysses_attention", q, k, v, causal, segments)
    divides("ulysses_attention", q, k, sharding)
    heads, ways = q.shape[2], shards(sharding, 1)
    _heads_divide(heads, sharding)
    k, v = repeat_kv_heads(k, v, heads, ways * shards(sharding, 2))
    names = split_over(sharding, 1)

    def local(q: Any, k: Any, v: Any, segments: Any) -> jax.Array:
        if ways > 1:
            q, k, v = (lax.all_to_all(x, names, 2, 1, tiled=True) for x in (q, k, v))
            segments = None if segments is None else lax.all_gather(segments, names, axis=1, tiled=True)
        y = local_attention(q, k, v, None, causal, scale, None, segments)
        return lax.all_to_all(y, names, 1, 2, tiled=True) if ways > 1 else y

    return over_mesh(local, sharding, 1)(q, k, v, segments)


def _heads_divide(heads: int, sharding: NamedSharding | None) -> None:
    taken, ways = shards(sharding, 2), shards(sharding, 1)
    if sharding is None or heads % (taken * ways) == 0:
        return
    names = [(name, sharding.mesh.shape[name]) for dim in (2, 1) for name in split_over(sharding, dim)]
    fits = [n for n in range(1, heads // taken + 1) if heads // taken % n == 0]
    raise InputError(
        f"ulysses_attention splits {heads} heads over {','.join(f'{a}={n}' for a, n in names)} of mesh "
        f"{describe(sharding.mesh)}, which {taken * ways} does not divide; split the length over "
        f"{' or '.join(map(str, fits))} instead of {ways}, take {taken * ways} heads, or use ring_attention, which "
        "splits no heads over the mesh axes of the length"
    )
