"""Blockwise attention: the online softmax of queries over keys that arrive in portions, and its gradient.

Queries and keys are cut into blocks, and a loop over pairs of blocks holds the scores of one pair at a time. For each
query it keeps the largest score so far, the sum of the exponentials and the weighted sum of the values, and rescales
them when a larger score comes (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682). The
gradient recomputes the probabilities from the logarithm of that sum (Dao et al. 2022, arXiv:2205.14135). Pairs of
blocks that a mask hides entirely are skipped.

In a block of queries, the heads that share a key head are stacked along the rows: `(batch, kv_heads, rows, head_dim)`
with groups * size rows. So everything is a batch of products of two matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.policy import accumulation_dtype

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a hidden key, as in `jax.nn.dot_product_attention`.

It is finite, so that a row with only hidden keys so far gives no NaN.
"""

NEVER = int(jnp.iinfo(jnp.int32).max)
"""Position of a key that pads a block: after every query."""


class Cut(NamedTuple):
    """How a length is cut: `pieces` that are not neighbors in the sequence, each of `count` blocks of `size`."""

    pieces: int
    count: int
    size: int

    def blocks(self, x: jax.Array, fill: int = 0) -> jax.Array:
        """`(batch, length, ...)` to `(pieces * count, batch, size, ...)`. `fill` pads the last block of a piece."""
        batch, length, *rest = x.shape
        x = x.reshape(batch, self.pieces, length // self.pieces, *rest)
        missing = self.count * self.size - x.shape[2]
        if missing:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), *[(0, 0)] * len(rest)], constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, self.pieces * self.count, self.size, *rest), 1, 0)

    def whole(self, x: jax.Array, length: int) -> jax.Array:
        """The inverse of `blocks`."""
        _, batch, _, *rest = x.shape
        x = jnp.moveaxis(x, 0, 1).reshape(batch, self.pieces, self.count * self.size, *rest)
        return x[:, :, : length // self.pieces].reshape(batch, length, *rest)


def cut(length: int, pieces: int, most: int) -> Cut:
    """Cut into blocks of at most `most` positions that are as equal in size as possible.

    >>> cut(10, 2, 4)
    Cut(pieces=2, count=2, size=3)
    """
    count = -(-(length // pieces) // most)
    return Cut(pieces, count, -(-(length // pieces) // count))


class Queries(NamedTuple):
    """Blocks of queries.

    Attributes:
        x: `(blocks, batch, kv_heads, rows, head_dim)`.
        at: `(blocks, rows)`, the position of each query in the sequence. None lets every query see every key.
        segments: `(blocks, batch, rows)`, or None.
    """

    x: jax.Array
    at: jax.Array | None
    segments: jax.Array | None


class Keys(NamedTuple):
    """Blocks of keys and values.

    Attributes:
        k, v: `(blocks, batch, kv_heads, size, head_dim)`.
        segments: `(blocks, batch, size)`, or None.
    """

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


class Running(NamedTuple):
    """State of the online softmax for each query.

    Attributes:
        top: `(..., rows, 1)`, the largest score so far.
        total: `(..., rows, 1)`, the sum of exponentials.
        values: `(..., rows, head_dim)`, the weighted sum of values.
    """

    top: jax.Array
    total: jax.Array
    values: jax.Array


class Slopes(NamedTuple):
    """What the gradient needs of each query.

    Attributes:
        dy: `(..., rows, head_dim)`, the cotangent of the output.
        lse: `(..., rows, 1)`, the logarithm of the sum of exponentials.
        delta: `(..., rows, 1)`, the product of the output and its cotangent.
    """

    dy: jax.Array
    lse: jax.Array
    delta: jax.Array


def start(x: jax.Array, head_dim: int) -> Running:
    """The state of queries that have seen no key yet."""
    one, dtype = (*x.shape[:-1], 1), accumulation_dtype(x)
    return Running(
        jnp.full(one, HIDDEN, dtype), jnp.zeros(one, dtype), jnp.zeros((*x.shape[:-1], head_dim), dtype)
    )  # fmt: skip


def attend(queries: Queries, keys: Keys, at: jax.Array | None, running: Running, exact: bool) -> Running:
    """Update `running` with more keys, whose positions are `at` `(blocks, size)`.

    With `exact`, positions and segments are compared key by key. Without, a pair of blocks is visible entirely or not
    at all, which the caller must know.
    """

    def rows(_: None, xs: Any) -> tuple[None, Running]:
        query, running = xs

        def columns(running: Running, xs: Any) -> tuple[Running, None]:
            key, at = xs
            step = lambda running: _see(query, key, at, running, exact)  # noqa: E731
            return _where_met(query, key, at, step, running), None

        return None, lax.scan(columns, running, (keys, at))[0]

    return lax.scan(rows, None, (queries, running))[1]


def gradients(
    queries: Queries, keys: Keys, at: jax.Array | None, slopes: Slopes, dq: jax.Array, exact: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dq` plus the part of these keys, and the gradients of keys and values. All have the dtype `wide`."""

    def rows(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
        query, slope, dq = xs

        def columns(dq: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            key, at, dk, dv = xs
            step = lambda sums: _slope(query, key, at, slope, sums, exact)  # noqa: E731
            dq, dk, dv = _where_met(query, key, at, step, (dq, dk, dv))
            return dq, (dk, dv)

        dq, carry = lax.scan(columns, dq, (keys, at, *carry))
        return carry, dq

    zeros = tuple(jnp.zeros(x.shape, accumulation_dtype(queries.x)) for x in (keys.k, keys.v))
    (dk, dv), dq = lax.scan(rows, zeros, (queries, slopes, dq))
    return dq, dk, dv


def _see(query: Queries, key: Keys, at: Any, running: Running, exact: bool) -> Running:
    """Update `running` of one block of queries with one block of keys."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query.x, key.k, preferred_element_type=accumulation_dtype(query.x))
    seen = _seen(query, key, at) if exact else None
    if seen is not None:
        scores = jnp.where(seen, scores, HIDDEN)
    top = jnp.maximum(running.top, jnp.max(scores, -1, keepdims=True))
    weights, keep = jnp.exp(scores - top), jnp.exp(running.top - top)
    total = running.total * keep + jnp.sum(weights, -1, keepdims=True)
    values = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(key.v.dtype), key.v, preferred_element_type=accumulation_dtype(query.x)
    )
    return Running(top, total, running.values * keep + values)


def _slope(query: Queries, key: Keys, at: Any, slope: Slopes, sums: Any, exact: bool) -> Any:
    """What one pair of blocks adds to the gradients of its queries, keys and values."""
    dq, dk, dv = sums
    narrow = query.x.dtype
    scores = jnp.einsum("bhqd,bhkd->bhqk", query.x, key.k, preferred_element_type=accumulation_dtype(query.x))
    weights = jnp.exp(scores - slope.lse)
    seen = _seen(query, key, at) if exact else None
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    dweights = jnp.einsum("bhqd,bhkd->bhqk", slope.dy, key.v, preferred_element_type=accumulation_dtype(query.x))
    dscores = (weights * (dweights - slope.delta)).astype(narrow)
    dv += jnp.einsum(
        "bhqk,bhqd->bhkd", weights.astype(narrow), slope.dy, preferred_element_type=accumulation_dtype(query.x)
    )
    dk += jnp.einsum("bhqk,bhqd->bhkd", dscores, query.x, preferred_element_type=accumulation_dtype(query.x))
    dq += jnp.einsum("bhqk,bhkd->bhqd", dscores, key.k, preferred_element_type=accumulation_dtype(query.x))
    return dq, dk, dv


def _seen(query: Queries, key: Keys, at: Any) -> jax.Array | None:
    """Which keys each query may see, `(batch or 1, 1, rows, size)`. None means all."""
    seen = None
    if query.at is not None:
        seen = (at[None] <= query.at[:, None])[None, None]
    if query.segments is not None and key.segments is not None:
        same = (query.segments[:, :, None] == key.segments[:, None, :])[:, None]
        seen = same if seen is None else seen & same
    return seen


def _where_met(query: Queries, key: Keys, at: Any, step: Any, carry: Any) -> Any:
    """`step(carry)` if a query of the block may see a key of the other block, else `carry`."""
    met = None
    if query.at is not None:
        met = jnp.min(at) <= jnp.max(query.at)
    if query.segments is not None and key.segments is not None:  # segments need not be sorted: compare ranges
        a, b = query.segments, key.segments
        overlap = jnp.any((a.min(-1) <= b.max(-1)) & (b.min(-1) <= a.max(-1)))
        met = overlap if met is None else met & overlap
    return step(carry) if met is None else lax.cond(met, step, lambda carry: carry, carry)
