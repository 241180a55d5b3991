"""Ring attention: a long sequence is split over several devices, and keys travel round the ring of devices.

Each device keeps its queries. Keys and values move to the next device while the current ones are worked on, until each
device has seen all. So the memory of a device grows with length / devices, and no (length x length) matrix exists
anywhere (`blockwise`). With a causal mask, `ring_zigzag` gives all devices equal work.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.errors import InputError
from sapwood.core.policy import accumulation_dtype
from sapwood.layers.attentions import blockwise, ring_zigzag
from sapwood.layers.attentions.blockwise import Cut, Keys, Queries, Slopes
from sapwood.layers.attentions.one_device import check_and_promote, float16_to_float32, repeat_kv_heads
from sapwood.parallel.per_device import per_device
from sapwood.parallel.place_activations import shards, split_over
from sapwood.parallel.rules import describe

BLOCK = 1024
"""Largest number of queries, and of keys, in a block."""

SCORES = 2**22
"""Largest number of scores that a device holds at once (16 MiB), as long as blocks keep `LEAST` queries and keys."""

LEAST = 256
"""Blocks get no smaller than this to stay within `SCORES`."""


class _Ring(NamedTuple):
    """Static settings of a ring, known while tracing. It compares by value.

    Attributes:
        causal: whether a query sees only the keys up to its own position.
        scale: factor of the scores.
        sharding: the sharding of q, None on one device.
        block: largest number of queries, and of keys, in a block.
    """

    causal: bool
    scale: float
    sharding: NamedSharding | None
    block: int

    @property
    def names(self) -> tuple[str, ...]:
        """Mesh axes of the ring, over which the length is split."""
        return split_over(self.sharding, 1)

    @property
    def n(self) -> int:
        """Number of devices in the ring."""
        return shards(self.sharding, 1)

    def cuts(self, q: jax.Array, k: jax.Array) -> tuple[Cut, Cut]:
        """How a device's queries and keys are cut: into two halves in the zigzag layout, into one piece otherwise."""
        pieces = 2 if self.zigzag(q) else 1
        return blockwise.cut(q.shape[1], pieces, self.block), blockwise.cut(k.shape[1], pieces, self.block)

    def zigzag(self, q: jax.Array) -> bool:
        """True if the zigzag layout is used: for causal attention, with an even number of positions a device.

        An odd number cannot be halved. The positions then stay in order, and the last device is the slowest.
        """
        return self.causal and self.n > 1 and q.shape[1] % 2 == 0


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool = False,
    scale: float | None = None,
    sharding: NamedSharding | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """`attention(q, k, v, causal=causal, scale=scale, segments=segments)` with the length split over devices.

    A device sends its keys and values on while it works on them. The backward pass saves q, k, v, the output and one
    float32 per query and head, and goes round the ring again. Sums and softmax are float32. A `causal` mask halves the
    work. It does so evenly on all devices (`ring_zigzag`) if 2 x devices divides the length.

    Args:
        q: `(batch, queries, heads, head_dim)`.
        k, v: `(batch, keys, kv_heads, head_dim)`.
        causal: whether query i sees only the keys 0 to i.
        scale: factor of the scores, 1 / sqrt(head_dim) by default.
        sharding: the sharding of q. The mesh axes of its second dimension are the ring; those of the batch and the
            heads split the rest. None runs the same computation on one device.
        segments: integers `(batch, length)`, or None.

    Returns:
        An array of the shape of q.

    Raises:
        InputError: the devices do not divide the batch, a length or the heads, or the shapes do not fit together.

    Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv:2310.01889).

    >>> import sapwood as sw
    >>> mesh = sw.mesh("sequence=-1")
    >>> x = jnp.arange(16.0).reshape(1, 16, 1, 1)
    >>> sharding = NamedSharding(mesh, PartitionSpec(None, "sequence", None, None))
    >>> attend = jax.jit(lambda x: ring_attention(0 * x, x, x, causal=True, sharding=sharding)[0, :4, 0, 0])
    >>> attend(x)
    Array([0. , 0.5, 1. , 1.5], dtype=float32)
    """
    q, k, v, segments = check_and_promote("ring_attention", q, k, v, causal, segments)
    divides("ring_attention", q, k, sharding)
    dtype, heads = q.dtype, q.shape[2]
    q, k, v = float16_to_float32(q, k, v)
    k, v = repeat_kv_heads(k, v, heads, shards(sharding, 2))
    each = q.shape[0] * heads // (shards(sharding, 0) * shards(sharding, 2))
    most = math.isqrt(SCORES // max(each, 1)) if isinstance(each, int) else LEAST  # a symbolic batch has no value yet
    block = min(BLOCK, max(LEAST, most))
    ring = _Ring(causal, q.shape[-1] ** -0.5 if scale is None else scale, sharding, block)
    y: Any = _attention(ring, q, k, v, segments)
    return y.astype(dtype)


def chosen(k: jax.Array, sharding: Any) -> bool:
    """True if this sharding splits the length of the queries, over devices that divide the length of the keys."""
    return isinstance(sharding, NamedSharding) and shards(sharding, 1) > 1 and k.shape[1] % shards(sharding, 1) == 0


def divides(who: str, q: jax.Array, k: jax.Array, sharding: NamedSharding | None) -> None:
    """Raise `InputError` unless `sharding` is None or one whose mesh divides the batch, the lengths and the heads."""
    if not isinstance(sharding, NamedSharding | None):
        raise InputError(
            f"{who}: sharding is that of q, a jax.sharding.NamedSharding(mesh, PartitionSpec(...)), or None; got "
            f"{sharding!r}"
        )
    for x, dim, what in ((q, 0, "batch"), (q, 1, "queries"), (k, 1, "keys"), (q, 2, "heads")):
        n = shards(sharding, dim)
        if sharding is not None and x.shape[dim] % n:
            size = x.shape[dim]
            axes = ",".join(f"{name}={sharding.mesh.shape[name]}" for name in split_over(sharding, dim))
            raise InputError(
                f"{who}: {size} {what} do not divide over {axes} of mesh {describe(sharding.mesh)}; take "
                f"{size - size % n or n} or {size - size % n + n}, or give those axes {math.gcd(size, n)} in all"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: _Ring, q: Any, k: Any, v: Any, segments: Any) -> jax.Array:
    return _forward(ring, q, k, v, segments)[0]


def _forward(ring: _Ring, q: Any, k: Any, v: Any, segments: Any) -> tuple[jax.Array, Any]:
    y, lse = over_mesh(functools.partial(_local_forward, ring), ring.sharding, 2)(q, k, v, segments)
    return y, (q, k, v, segments, y, lse)


def _backward(ring: _Ring, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, y, lse = saved
    run = over_mesh(functools.partial(_local_backward, ring), ring.sharding, 3)
    return *run(q, k, v, segments, y, lse, dy), None


_attention.defvjp(_forward, _backward)


def over_mesh(f: Any, sharding: NamedSharding | None, outputs: int) -> Any:
    """Run `f` on each device's part of its arrays. Without a sharding, return `f`.

    Arrays of 4 dimensions are split like q, those of 2 dimensions like its batch and length. `outputs` is the number of
    arrays of 4 dimensions that `f` returns.
    """
    if sharding is None:
        return f
    split = PartitionSpec(*(split_over(sharding, dim) or None for dim in range(3)), None)

    def run(*arrays: Any) -> Any:
        specs = tuple(None if x is None else PartitionSpec(*split[: x.ndim]) for x in arrays)
        return per_device(f, sharding.mesh, specs, (split,) * outputs if outputs > 1 else split)(*arrays)

    return run


def _local_forward(ring: _Ring, q: Any, k: Any, v: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
    """Forward pass of one device: its output `(batch, length, heads, head_dim)`, and `lse` `(batch, length, heads, 1)`.

    `lse`, the logarithm of the sum of exponentials, stays in the zigzag layout.
    """
    rows, columns = ring.cuts(q, k)
    turn = _turned(ring, q)
    queries, keys = (
        _queries(ring, rows, columns, turn(q), k, turn(segments)),
        _keys(columns, *map(turn, (k, v, segments))),
    )
    exact = _exact(columns, k, segments)
    running = blockwise.start(queries.x, k.shape[3])
    running = blockwise.attend(queries, keys, _places(ring, columns, k, 0), running, True)

    def step(carry: Any, hop: jax.Array) -> tuple[Any, None]:
        keys, running = carry
        after = _passed(ring, keys)  # sent during the work below
        return (after, blockwise.attend(queries, keys, _places(ring, columns, k, hop), running, exact)), None

    if ring.n > 1:
        (_, running), _ = lax.scan(step, (_passed(ring, keys), running), jnp.arange(1, ring.n))
    y = _unblocked(rows, (running.values / running.total).astype(q.dtype), q)
    lse = _unblocked(rows, running.top + jnp.log(running.total), q)
    return ring_zigzag.leave(y, ring.names, ring.n) if ring.zigzag(q) else y, lse


def _local_backward(
    ring: _Ring, q: Any, k: Any, v: Any, segments: Any, y: Any, lse: Any, dy: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Backward pass of one device: the gradients of its queries, keys and values.

    The gradients of keys and values travel round the ring with them.
    """
    rows, columns = ring.cuts(q, k)
    turn = _turned(ring, q)
    delta = jnp.sum(y.astype(accumulation_dtype(y)) * dy.astype(accumulation_dtype(y)), -1, keepdims=True)
    slopes = Slopes(*(_rows(rows, x, k.shape[2]) for x in (turn(dy), lse, turn(delta))))
    queries, keys = (
        _queries(ring, rows, columns, turn(q), k, turn(segments)),
        _keys(columns, *map(turn, (k, v, segments))),
    )
    exact = _exact(columns, k, segments)
    dq = jnp.zeros(queries.x.shape, accumulation_dtype(q))
    dq, *dkv = blockwise.gradients(queries, keys, _places(ring, columns, k, 0), slopes, dq, True)

    def step(carry: Any, hop: jax.Array) -> tuple[Any, None]:
        keys, dq, dkv = carry
        after, dkv = _passed(ring, (keys, dkv))  # sent during the work below
        dq, *more = blockwise.gradients(queries, keys, _places(ring, columns, k, hop), slopes, dq, exact)
        return (after, dq, jax.tree.map(jnp.add, dkv, more)), None

    if ring.n > 1:
        (_, dq, dkv), _ = lax.scan(step, (_passed(ring, keys), dq, dkv), jnp.arange(1, ring.n))
        dkv = _passed(ring, dkv)  # the last hop, to the device that owns them
    dq = _unblocked(rows, (dq * ring.scale).astype(q.dtype), q)
    dk, dv = (columns.whole(x.astype(k.dtype).swapaxes(2, 3), k.shape[1]) for x in dkv)
    return tuple(ring_zigzag.leave(x, ring.names, ring.n) if ring.zigzag(q) else x for x in (dq, dk, dv))  # type: ignore


def _turned(ring: _Ring, q: jax.Array) -> Any:
    """The function that brings an array into the layout of the ring: zigzag, or unchanged."""
    if not ring.zigzag(q):
        return lambda x: x
    return lambda x: None if x is None else ring_zigzag.enter(x, ring.names, ring.n)


def _passed(ring: _Ring, tree: Any) -> Any:
    """Send each device's arrays to the next device of the ring."""
    return lax.ppermute(tree, ring.names, [(i, (i + 1) % ring.n) for i in range(ring.n)])


def _exact(columns: Cut, k: jax.Array, segments: Any) -> bool:
    """True if keys of another device must be masked one by one. A causal mask hides only whole blocks of them."""
    return segments is not None or _filled(columns, k)


def _filled(columns: Cut, k: jax.Array) -> bool:
    """True if some blocks of keys are padded."""
    return columns.pieces * columns.count * columns.size != k.shape[1]


def _rows(rows: Cut, x: jax.Array, kv_heads: int) -> jax.Array:
    """`(batch, length, heads, d)` to `(blocks, batch, kv_heads, groups * size, d)`."""
    x = rows.blocks(x)
    count, batch, size, heads, d = x.shape
    x = x.reshape(count, batch, size, kv_heads, heads // kv_heads, d)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(count, batch, kv_heads, heads // kv_heads * size, d)


def _unblocked(rows: Cut, x: jax.Array, q: jax.Array) -> jax.Array:
    """The inverse of `_rows`, for queries q."""
    count, batch, kv_heads, _, d = x.shape
    heads = q.shape[2]
    x = x.reshape(count, batch, kv_heads, heads // kv_heads, rows.size, d).transpose(0, 1, 4, 2, 3, 5)
    return rows.whole(x.reshape(count, batch, rows.size, heads, d), q.shape[1])


def _queries(ring: _Ring, rows: Cut, columns: Cut, q: jax.Array, k: jax.Array, segments: Any) -> Queries:
    groups = q.shape[2] // k.shape[2]
    scaled = (q.astype(accumulation_dtype(q)) * ring.scale).astype(q.dtype)
    hides = ring.causal or _filled(columns, k)
    return Queries(
        _rows(rows, scaled, k.shape[2]),
        jnp.tile(_places(ring, rows, q, 0, fill=-1), (1, groups)) if hides else None,
        None if segments is None else jnp.tile(rows.blocks(segments), (1, 1, groups)),
    )


def _keys(columns: Cut, k: jax.Array, v: jax.Array, segments: Any) -> Keys:
    k, v = (columns.blocks(x).swapaxes(2, 3) for x in (k, v))
    return Keys(k, v, None if segments is None else columns.blocks(segments))


def _places(ring: _Ring, cut: Cut, x: jax.Array, hops: Any, fill: int = blockwise.NEVER) -> jax.Array:
    """Positions `(blocks, size)` in the sequence of the blocks that have come to this device after `hops` hops.

    They are all 0 if the attention is not causal. Padding has position `fill`.
    """
    length = x.shape[1]
    device = (lax.axis_index(ring.names) - hops) % ring.n if ring.n > 1 else 0
    each = length // cut.pieces
    first = ring_zigzag.starts(device, ring.n, each) if cut.pieces > 1 else jnp.asarray([device * length])
    at = (first[:, None] + jnp.arange(each)[None]).reshape(1, length).astype(jnp.int32)
    return cut.blocks(at if ring.causal else jnp.zeros_like(at), fill)[:, 0]
