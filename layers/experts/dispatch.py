"""Dispatch: tokens are sorted by expert, the experts run, and the results return to their tokens.

`through_experts` does this on one device, `through_spread_experts` with the experts spread over a mesh axis. Forward
and backward pass use only gathers (`pick`), since scatters are slow.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.layers.experts.all_to_all import Axis, bring_back, send, swap


def by_group(groups: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How to sort rows by group: `order` (which row comes i-th), `place` (where row j comes) and `sizes` `(n,)`.

    Takes integers `(rows,)` below `n`, or `n` for a row of no group, which comes last. Rows of a group keep their
    order.

    >>> [x.tolist() for x in by_group(jnp.array([1, 2, 0, 1]), 2)]
    [[2, 0, 3, 1], [1, 3, 0, 2], [1, 2]]
    """
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(groups[:, None] == jnp.arange(n)[None], axis=0, dtype=jnp.int32)
    return order, place, sizes


@jax.custom_vjp
def pick(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Row i of the result is the sum of the rows `index[i]` of x. Indices past the last row add nothing.

    x is `(rows, features)`, index `(picked, m)`. `back` `(rows, n)` is the inverse of index: the result rows that each
    row of x went to, filled up with indices past the last. With it the gradient is a `pick` too. JAX would make it a
    scatter, which adds one row after the other on CPUs and TPUs.

    >>> pick(jnp.array([[1.0], [2.0]]), jnp.array([[1], [0], [2]]), jnp.array([[1], [0]]))[:, 0]
    Array([2., 1., 0.], dtype=float32)
    """
    found = x.at[index].get(mode="fill", fill_value=0)
    return found[:, 0] if index.shape[1] == 1 else found.sum(1)


def _forward(x, index, back):
    return pick(x, index, back), (index, back)


def _backward(kept, dy):
    index, back = kept
    return pick(dy, back, index), None, None


pick.defvjp(_forward, _backward)


Run = Callable[[jax.Array, jax.Array, int], jax.Array]
"""`run(rows, sizes, expected)` applies the experts to rows sorted by expert.

`sizes` is the number of rows of each expert, `expected` the expected number of all rows.
"""


def through_experts(experts: int, most: int, tokens: jax.Array, ids: jax.Array, expected: int, run: Run) -> jax.Array:
    """Apply the experts that a device holds to its tokens.

    Args:
        experts: number of experts.
        most: largest number of tokens of one expert. The caller guarantees that no expert gets more.
        tokens: `(n, features)`.
        ids: `(n, k)`, the experts of each token; `experts` stands for no expert.
        expected: expected number of rows that have an expert.
        run: the experts.

    Returns:
        `(n, k, features)`, with zeros where there is no expert.
    """
    n, k = ids.shape
    order, place, sizes = by_group(ids.reshape(-1), experts)
    order = order[: min(n * k, experts * most)]
    rows = pick(tokens, order[:, None] // k, place.reshape(n, k))
    y = pick(run(rows, sizes, expected), place[:, None], order[:, None])
    return y.reshape(n, k, y.shape[-1])  # no -1: n may be 0


def through_spread_experts(
    platform: str, axis: Axis, experts: int, most: int, tokens: jax.Array, ids: jax.Array, run: Run
) -> jax.Array:
    """`through_experts` inside a `jax.shard_map` over `axis`, where each device holds an equal part of the experts.

    `experts` is the number on all devices, and ids refer to all of them. `most` counts the tokens of one device. The
    buffer for received rows has the size of the worst case: a token sends at most min(k, experts of a device) rows to a
    device, and all tokens may choose the same device.
    """
    devices = lax.axis_size(axis)
    here, (n, k) = experts // devices, ids.shape
    width = min(n * min(k, here), here * most)

    def remote(rows: jax.Array, sizes: jax.Array, expected: int) -> jax.Array:
        each = sizes.reshape(devices, here)
        got = swap(axis, each)
        sent, received = each.sum(1), got.sum(1)
        buffer: jax.Array = send(platform, axis, width, rows, sent, received)
        y = _regrouped(buffer, got, width, expected, run)
        return bring_back(platform, axis, rows.shape[0], y, sent, received)

    return through_experts(experts, most, tokens, ids, n * k, remote)


def _regrouped(buffer: jax.Array, got: jax.Array, width: int, expected: int, run: Run) -> jax.Array:
    """Apply `run` to a buffer sorted by sender, then by expert.

    `got` `(senders, experts)` is the number of rows of each. Each sender has `width` rows of the buffer.
    """
    column = jnp.arange(width)
    group = jax.vmap(lambda ends: jnp.searchsorted(ends, column, side="right"))(jnp.cumsum(got, 1))
    order, place, sizes = by_group(group.reshape(-1), got.shape[1])  # rows past a sender's last are of no group
    rows = pick(buffer, order[:, None], place[:, None])
    return pick(run(rows, sizes, expected), place[:, None], order[:, None])
