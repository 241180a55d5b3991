"""Attention block by block: the online softmax of some queries over keys that come in portions, and its gradient.

Queries and keys are cut into blocks, and a loop over pairs of them holds one block of scores at a time. A block of
queries keeps the largest score so far, the sum of the exponentials and the weighted sum of the values, and corrects
them when a larger score comes (Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682). The
gradient makes the probabilities again from the logarithm of that sum (Dao et al. 2022, arXiv:2205.14135). Pairs of
blocks that a mask hides whole are left out.

In a block, the query heads that share a key head lie below one another: `(batch, kv_heads, rows, head_dim)` with
groups * size rows, so that everything is a batch of products of two matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.policy import wide

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The score of a key that may not be seen, as in `jax.nn.dot_product_attention`: finite, so that a row in which all are
hidden so far makes no NaN."""

NEVER = int(jnp.iinfo(jnp.int32).max)
"""The place of a key that fills up a block: after every query."""


class Cut(NamedTuple):
    """How a length is cut: `pieces` that are not neighbours in the sequence, each of `count` blocks of `size`."""

    pieces: int
    count: int
    size: int

    def blocks(self, x: jax.Array, fill: int = 0) -> jax.Array:
        """`(batch, length, ...)` to `(pieces * count, batch, size, ...)`, the last block of a piece filled up."""
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
    """Blocks as even as can be, of at most `most`.

    >>> cut(10, 2, 4)
    Cut(pieces=2, count=2, size=3)
    """
    count = -(-(length // pieces) // most)
    return Cut(pieces, count, -(-(length // pieces) // count))


class Queries(NamedTuple):
    """Blocks of queries: x `(blocks, batch, kv_heads, rows, head_dim)`, `at` `(blocks, rows)`, `segments`.

    `at` is the place of each in the sequence, None where every key may be seen; `segments` `(blocks, batch, rows)` or
    None.
    """

    x: jax.Array
    at: jax.Array | None
    segments: jax.Array | None


class Keys(NamedTuple):
    """Blocks of keys and values `(blocks, batch, kv_heads, size, head_dim)`, `segments` `(blocks, batch, size)`."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


class Running(NamedTuple):
    """For each query the largest score, the sum of exponentials `(..., rows, 1)` and of values `(..., head_dim)`."""

    top: jax.Array
    total: jax.Array
    values: jax.Array


class Slopes(NamedTuple):
    """What the gradient needs of each query: of the output `(..., rows, head_dim)`; `lse` and `delta` `(..., rows, 1)`.

    `lse` is the logarithm of the sum of exponentials, `delta` the product of output and its gradient.
    """

    dy: jax.Array
    lse: jax.Array
    delta: jax.Array


def start(x: jax.Array, head_dim: int) -> Running:
    """Queries that have seen no key yet."""
    one, dtype = (*x.shape[:-1], 1), wide(x)
    return Running(
        jnp.full(one, HIDDEN, dtype), jnp.zeros(one, dtype), jnp.zeros((*x.shape[:-1], head_dim), dtype)
    )  # fmt: skip


def attend(queries: Queries, keys: Keys, at: jax.Array | None, running: Running, exact: bool) -> Running:
    """Let queries see more keys, at places `at` `(blocks, size)`.

    With `exact`, places and segments are compared key by key. Without, a pair of blocks is seen whole or not at all,
    which is for the caller to know.
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
    """`dq` with what these keys add to it, and the gradients of keys and values; all of them `wide`."""

    def rows(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
        query, slope, dq = xs

        def columns(dq: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            key, at, dk, dv = xs
            step = lambda sums: _slope(query, key, at, slope, sums, exact)  # noqa: E731
            dq, dk, dv = _where_met(query, key, at, step, (dq, dk, dv))
            return dq, (dk, dv)

        dq, carry = lax.scan(columns, dq, (keys, at, *carry))
        return carry, dq

    zeros = tuple(jnp.zeros(x.shape, wide(queries.x)) for x in (keys.k, keys.v))
    (dk, dv), dq = lax.scan(rows, zeros, (queries, slopes, dq))
    return dq, dk, dv


def _see(query: Queries, key: Keys, at: Any, running: Running, exact: bool) -> Running:
    """One block of queries sees one block of keys."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query.x, key.k, preferred_element_type=wide(query.x))
    seen = _seen(query, key, at) if exact else None
    if seen is not None:
        scores = jnp.where(seen, scores, HIDDEN)
    top = jnp.maximum(running.top, jnp.max(scores, -1, keepdims=True))
    weights, keep = jnp.exp(scores - top), jnp.exp(running.top - top)
    total = running.total * keep + jnp.sum(weights, -1, keepdims=True)
    values = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(key.v.dtype), key.v, preferred_element_type=wide(query.x))
    return Running(top, total, running.values * keep + values)


def _slope(query: Queries, key: Keys, at: Any, slope: Slopes, sums: Any, exact: bool) -> Any:
    """What one pair of blocks adds to the gradients of its queries, keys and values."""
    dq, dk, dv = sums
    narrow = query.x.dtype
    scores = jnp.einsum("bhqd,bhkd->bhqk", query.x, key.k, preferred_element_type=wide(query.x))
    weights = jnp.exp(scores - slope.lse)
    seen = _seen(query, key, at) if exact else None
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    dweights = jnp.einsum("bhqd,bhkd->bhqk", slope.dy, key.v, preferred_element_type=wide(query.x))
    dscores = (weights * (dweights - slope.delta)).astype(narrow)
    dv += jnp.einsum("bhqk,bhqd->bhkd", weights.astype(narrow), slope.dy, preferred_element_type=wide(query.x))
    dk += jnp.einsum("bhqk,bhqd->bhkd", dscores, query.x, preferred_element_type=wide(query.x))
    dq += jnp.einsum("bhqk,bhkd->bhqd", dscores, key.k, preferred_element_type=wide(query.x))
    return dq, dk, dv


def _seen(query: Queries, key: Keys, at: Any) -> jax.Array | None:
    """Which keys each query may see, `(batch or 1, 1, rows, size)`; None for all."""
    seen = None
    if query.at is not None:
        seen = (at[None] <= query.at[:, None])[None, None]
    if query.segments is not None and key.segments is not None:
        same = (query.segments[:, :, None] == key.segments[:, None, :])[:, None]
        seen = same if seen is None else seen & same
    return seen


def _where_met(query: Queries, key: Keys, at: Any, step: Any, carry: Any) -> Any:
    """`step(carry)`, or `carry` where no query of the block may see a key of the other."""
    met = None
    if query.at is not None:
        met = jnp.min(at) <= jnp.max(query.at)
    if query.segments is not None and key.segments is not None:  # segments need not be sorted: ranges that overlap
        a, b = query.segments, key.segments
        overlap = jnp.any((a.min(-1) <= b.max(-1)) & (b.min(-1) <= a.max(-1)))
        met = overlap if met is None else met & overlap
    return step(carry) if met is None else lax.cond(met, step, lambda carry: carry, carry)
