"""Regression losses: outputs and target of one shape give float32 losses.

The losses have that shape, too, except that `cosine_distance` reduces the last axis. All raise `DataError` if the
shapes of outputs and target differ.
"""

import math
import sys

import jax
import jax.numpy as jnp
import optax

from sapwood.losses.reduction import as_float32, check_option
from sapwood.metrics import same_shape


def squared_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error ``(outputs - target) ** 2`` of each element; outputs, target and result have the same shape.

    >>> squared_error(jnp.array([1., 2.]), jnp.array([1., 4.])).tolist()
    [0.0, 4.0]
    """
    same_shape("squared_error", outputs, target)
    return optax.squared_error(as_float32(outputs), as_float32(target))


def absolute_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Absolute error ``|outputs - target|`` of each element; outputs, target and result have the same shape.

    >>> absolute_error(jnp.array([1., 2.]), jnp.array([1., 4.])).tolist()
    [0.0, 2.0]
    """
    same_shape("absolute_error", outputs, target)
    return jnp.abs(as_float32(outputs) - as_float32(target))


def huber(outputs: jax.Array, target: jax.Array, delta: float = 1.0) -> jax.Array:
    """Huber loss of each element: quadratic for errors up to ``delta``, linear beyond (Huber 1964).

    Outputs, target and result have the same shape. Raises `ConfigError` for a ``delta`` that is not above 0.

    >>> huber(jnp.array([0.5, 3.0]), jnp.zeros(2)).tolist()
    [0.125, 2.5]
    """
    check_option("huber", "delta", delta, sys.float_info.min, math.inf, "a number above 0")
    same_shape("huber", outputs, target)
    return optax.huber_loss(as_float32(outputs), as_float32(target), delta=delta)


def log_cosh(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Logarithm of the hyperbolic cosine, ``log(cosh(outputs - target))``, of each element.

    Outputs, target and result have the same shape.

    >>> log_cosh(jnp.ones(1), jnp.ones(1)).tolist()
    [0.0]
    """
    same_shape("log_cosh", outputs, target)
    return optax.log_cosh(as_float32(outputs), as_float32(target))


def cosine_distance(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Cosine distance: one minus the cosine of the angle between vectors (..., features), as losses (...).

    >>> cosine_distance(jnp.array([[1., 0.]]), jnp.array([[0., 2.]])).tolist()
    [1.0]
    """
    same_shape("cosine_distance", outputs, target)
    return optax.cosine_distance(as_float32(outputs), as_float32(target), epsilon=1e-8)
