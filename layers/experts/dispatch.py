"""Dispatch: tokens brought to their experts, in the order of the experts, and back; gathers in both directions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.layers.experts.all_to_all import Axis, bring_back, send, swap


def by_group(groups: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How to sort rows by group: `order` (which row comes i-th), `place` (where row j comes) and `sizes` `(n,)`.

    Takes integers `(rows,)`; rows of group n belong nowhere and come last. Rows of a group keep their order.

    >>> [x.tolist() for x in by_group(jnp.array([1, 2, 0, 1]), 2)]
    [[2, 0, 3, 1], [1, 3, 0, 2], [1, 2]]
    """
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(groups[:, None] == jnp.arange(n)[None], axis=0, dtype=jnp.int32)
    return order, place, sizes


@jax.custom_vjp
def pick(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Row i of the result is the sum of the rows `index[i]` of x; indices behind the last row stand for none.

    Takes x `(rows, features)`, index `(picked, m)` and `back` `(rows, n)`, which says where each row of x went, with
    indices behind the last for "nowhere". From it the gradient is a `pick` too, where JAX would make a scatter: that
    adds row after row on a CPU, and one after the other on a TPU.

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
"""`run(rows, sizes, expected)`: the experts on rows sorted by expert, so many of each, so many in all one expects."""


def through_experts(experts: int, most: int, tokens: jax.Array, ids: jax.Array, expected: int, run: Run) -> jax.Array:
    """What the experts that a device holds make of its tokens.

    Takes tokens `(n, features)` and ids `(n, k)`, where the number of experts stands for none; gives
    `(n, k, features)`, zeros where there is no expert. None gets more than `most` tokens.
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
    """`through_experts` inside a `jax.shard_map` over `axis`, where each device holds its share of the experts.

    `most` is for the tokens of one device. The room for what may arrive is that for the worst case: a token sends at
    most min(k, experts of a device) rows to a device, and all tokens may choose the same.
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
    """`run` on a buffer sorted by sender, then by expert: `got` `(senders, experts)` says how many of each."""
    column = jnp.arange(width)
    group = jax.vmap(lambda ends: jnp.searchsorted(ends, column, side="right"))(jnp.cumsum(got, 1))
    order, place, sizes = by_group(group.reshape(-1), got.shape[1])  # behind the last is no group
    rows = pick(buffer, order[:, None], place[:, None])
    return pick(run(rows, sizes, expected), place[:, None], order[:, None])
