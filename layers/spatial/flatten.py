"""Flatten: merge all dimensions but the batch into one. Layers that only change an array's shape belong here."""

import math

import jax

from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs


def flatten(x: jax.Array) -> jax.Array:
    """Merge all dimensions but the batch: `(batch, ...)` to `(batch, features)`. Raises `InputError` for a scalar.

    >>> import jax.numpy as jnp
    >>> flatten(jnp.ones((2, 3, 4))).shape
    (2, 12)
    """
    x = check_inputs.array("flatten", x)
    check_inputs.at_least("flatten", x, 1, "(batch, ...)")
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


class Flatten(Layer):
    """Merge all dimensions but the batch: `(batch, ...)` to `(batch, features)`. No parameters.

    >>> import jax.numpy as jnp
    >>> Flatten()({}, jnp.ones((2, 3, 4))).shape
    (2, 12)
    """

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        return flatten(x)
