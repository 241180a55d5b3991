"""The activations of a model that say where they live: each `v.shard`, with its path, found without computing."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sapwood.core import paths
from sapwood.core.declare import Recorder
from sapwood.core.spec import trace


class Activation(NamedTuple):
    """One array that `v.shard` was given; `copies` is how many a stack of layers makes of it."""

    path: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: Any
    copies: int


def activations(f: Callable, *xs: Any, policy: Any = None) -> tuple[Activation, ...]:
    """The activations of ``f(v, *xs)`` in a training run, in its order; those alike at one path are one.

    `xs` are arrays or `jax.ShapeDtypeStruct`, in any pytree. Nothing is computed, and no mesh is needed.

    >>> import jax.numpy as jnp
    >>> def model(v, x):
    ...     return v.head.shard(2 * x, "batch", "embed")
    >>> activations(model, jnp.ones((8, 4)))[0][:3]
    ('head', ('batch', 'embed'), (8, 4))
    """
    found: dict[Activation, None] = {}

    def note(v: Any, x: jax.Array, axes: tuple[str | None, ...]) -> None:
        copies = math.prod(level.size for level in v._stacked)
        found.setdefault(Activation(paths.join(v._path), tuple(axes), tuple(x.shape), x.dtype, copies))

    trace(f, xs, Recorder(on_shard=note), train=True, policy=policy)
    return tuple(found)
