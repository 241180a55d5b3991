"""Vmap: n copies of a layer side by side, each with its own variables.

It is `jax.vmap` of the layer, over variables stacked along a leading dimension of n.
"""

from collections.abc import Callable
from typing import Any

import jax

from sapwood.core.bind import pure
from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs


class Vmap(Layer):
    """`n` copies of `layer` in one vectorized call: experts, ensembles, heads. Outputs are stacked along a new axis 0.

    Each variable has a leading dimension of n. Random keys differ from copy to copy. Raises `ConfigError` for an n
    below 1, and for a tuple `in_axes` whose length is not the number of inputs.

    Args:
        layer: the layer that is copied.
        n: number of copies.
        axis: logical name of the leading dimension of each variable.
        in_axes: axis of the inputs that runs over the copies, as in `jax.vmap`: 0 by default; None passes the whole
            input to every copy; a tuple has one entry for each input.

    >>> import jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> v = {"kernel": jnp.array([1.0, 10.0]).reshape(2, 1, 1)}
    >>> Vmap(L.Dense(1, bias=False), 2, in_axes=None)(v, jnp.array([3.0]))[:, 0]
    Array([ 3., 30.], dtype=float32)
    """

    layer: Callable
    n: int
    axis: str | None = "expert"
    in_axes: int | tuple[int | None, ...] | None = 0

    def __post_init__(self) -> None:
        check_inputs.positive(self, "n")

    def __call__(self, v: Vars, *xs: Any) -> Any:
        axes = self.in_axes if isinstance(self.in_axes, tuple) else (self.in_axes,) * len(xs)
        if len(axes) != len(xs):
            raise ConfigError(f"Vmap: in_axes={self.in_axes} speaks for {len(axes)} inputs, the call has {len(xs)}")
        copies = jax.vmap(pure(self.layer), in_axes=(0, *axes), axis_size=self.n)
        y, updates = copies(v.stack(self.n, self.axis), *xs)
        v.merge(updates)
        return y
