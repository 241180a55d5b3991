"""The activations of a model with logical axes: each call of `v.shard`, with its path.

They are found by tracing the model on shapes, so nothing is computed. Activations without a `v.shard` are not seen.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sapwood.core import paths
from sapwood.core.declare import Recorder
from sapwood.core.spec import trace


class Activation(NamedTuple):
    """An array that the model passes to `v.shard`.

    Attributes:
        path: the path of the cursor.
        axes: the logical axis of each dimension; None for a dimension without one.
        shape: the shape of one copy.
        dtype: its dtype.
        copies: how many copies a stack of layers (`L.Scan`, `L.Vmap`) makes of it; 1 outside stacks.
    """

    path: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: Any
    copies: int


def activations(f: Callable, *xs: Any, policy: Any = None) -> tuple[Activation, ...]:
    """The activations of ``f(v, *xs)`` in train mode, in the order of calls. Equal ones at one path are listed once.

    `xs` are arrays or `jax.ShapeDtypeStruct`, in any pytree. `policy` is the precision policy; None is the default.
    Nothing is computed, and no mesh is needed.

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
