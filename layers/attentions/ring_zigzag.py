"""Zigzag layout: which two half-chunks of a sequence each device works on, so that a causal mask gives all equal work.

If the length is cut in order, the last of n devices sees all keys and the first an n-th of them. In the zigzag layout
the length is cut into 2 n half-chunks, and device i has the i-th from the front and the i-th from the end. (Zhu 2024,
"ring-flash-attention", https://github.com/zhuzilin/ring-flash-attention; Grattafiori et al. 2024, "The Llama 3 Herd of
Models", arXiv:2407.21783, section 3.3.2; another such order is Brandon et al. 2023, "Striped Attention",
arXiv:2311.09431.)

Callers keep their order: `enter` and `leave` convert it, by two `ppermute` of half an array each, inside a
`jax.shard_map`. Of a device's two halves, the first has an even number and the second an odd one, even if that reverses
their order in the sequence. `starts` says where they begin.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def homes(n: int) -> tuple[list[int], list[int]]:
    """The devices that half-chunks 0, 2, 4, ... and 1, 3, 5, ... go to.

    >>> homes(4)
    ([0, 2, 3, 1], [1, 3, 2, 0])
    """
    home = [min(half, 2 * n - 1 - half) for half in range(2 * n)]
    return home[::2], home[1::2]


def enter(x: jax.Array, names: tuple[str, ...], n: int) -> jax.Array:
    """Bring a device's piece `(batch, length / n, ...)` of an array in order into the zigzag layout."""
    halves = jnp.split(x, 2, axis=1)
    moved = [lax.ppermute(half, names, list(enumerate(to))) for half, to in zip(halves, homes(n), strict=True)]
    return jnp.concatenate(moved, 1)


def leave(x: jax.Array, names: tuple[str, ...], n: int) -> jax.Array:
    """Bring a device's piece back from the zigzag layout: the inverse of `enter`."""
    halves = jnp.split(x, 2, axis=1)
    ways = [[(b, a) for a, b in enumerate(to)] for to in homes(n)]
    return jnp.concatenate([lax.ppermute(half, names, way) for half, way in zip(halves, ways, strict=True)], 1)


def starts(device: Any, n: int, half: int) -> jax.Array:
    """The positions at which the two halves of a device begin. `half` is the length of one.

    >>> [starts(i, 2, 10).tolist() for i in range(2)]
    [[0, 30], [20, 10]]
    """
    front, back = device, 2 * n - 1 - device
    even = device % 2 == 0
    return half * jnp.stack([jnp.where(even, front, back), jnp.where(even, back, front)])
