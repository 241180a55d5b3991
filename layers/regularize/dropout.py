"""Dropout: in training, random entries become zero and the others are scaled up to keep the mean.

`dropout` takes a random key as an argument. `Dropout` derives its key from the run's key and the path of the layer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero each entry of x with probability `rate`, drawn from `key`, and divide the others by `1 - rate`.

    x and the result have any shape. Raises `InputError` for an x that is not floating, `ConfigError` for a rate outside
    [0, 1).

    >>> float(dropout(jnp.ones(1000), 0.5, jax.random.key(0)).max())
    2.0
    """
    x = check_inputs.floating("dropout", x)
    if not 0 <= rate < 1:
        raise ConfigError(f"dropout: rate must be a number in [0, 1), got {rate!r}")
    kept = jax.random.bernoulli(key, np.float32(1 - rate), x.shape)  # float32: the same mask with `jax_enable_x64`
    return jnp.where(kept, x / (1 - rate), 0)


class Dropout(Layer):
    """Zero entries with probability `rate` in training, and divide the others by `1 - rate`; the identity in eval mode.

    The input has any shape. There are no parameters. The mask is drawn with a key that is derived from the run's key
    and the layer's path. Each layer, each training step and each call has its own mask, and each example in a batch has
    its own part of it. Raises `ConfigError` for a rate outside [0, 1), `InputError` for an x that is not floating.

    Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".

    >>> Dropout(0.5)({}, jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """

    rate: float

    def __post_init__(self) -> None:
        check_inputs.within(self, "rate", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = check_inputs.floating("Dropout", x)
        return dropout(x, self.rate, v.rng("mask")) if v.train and self.rate else x
