"""Shapes and dtypes of outputs, targets and weights: what metrics and losses accept, and how they align it.

Shapes that NumPy would broadcast by accident, such as (n, 1) and (n,), raise `DataError`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import DataError


def lead(weight: Any, shape: tuple[int, ...]) -> jax.Array:
    """Append axes of size 1 to ``weight`` (batch, ...), so that it broadcasts over ``shape`` (batch, ..., features).

    Raises `DataError` if ``shape`` does not start with the weight's shape.

    >>> lead(jnp.ones(2), (2, 3)).shape
    (2, 1)
    """
    weight = jnp.asarray(weight)
    if weight.shape != tuple(shape[: weight.ndim]):
        raise DataError(
            f"a mask or weight of shape {weight.shape} does not lead the shape {tuple(shape)} of the "
            f"per-example values; give one number per example, or per position of each example"
        )
    return weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))


def same_shape(what: str, outputs: jax.Array, target: jax.Array) -> None:
    """Raise `DataError` unless both shapes are equal (NumPy would broadcast (n, 1) against (n,) to (n, n)).

    ``what`` is what the message calls the loss or metric.
    """
    if outputs.shape != target.shape:
        raise DataError(
            f"{what} compares outputs and target element by element, but the outputs have shape "
            f"{outputs.shape} and the target {target.shape}; reshape one of them"
        )


def columns(x: jax.Array) -> jax.Array:
    """Reshape values (..., outputs) to (examples, outputs), and values (examples,) to (examples, 1).

    >>> columns(jnp.ones((2, 3, 4))).shape, columns(jnp.ones(5)).shape
    ((6, 4), (5, 1))
    """
    return x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)


def column_weight(weight: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """The weight to use with `columns` of values of this ``shape``: (examples, 1), (examples, outputs), or None."""
    if weight is None:
        return None
    weight = lead(weight, shape)
    if len(shape) > 1:
        weight = jnp.broadcast_to(weight, (*shape[:-1], weight.shape[-1]))
    return columns(weight)


def labels(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Class labels (...) from a target of class labels, or of one probability per class, for outputs (..., classes).

    Raises `DataError` for any other target, such as one number or several independent labels per example.

    >>> labels(jnp.zeros((2, 3)), jnp.array([[0.0, 0.9, 0.1], [1.0, 0.0, 0.0]])).tolist()
    [1, 0]
    """
    if outputs.ndim and outputs.shape[-1] > 1:
        if not jnp.issubdtype(target.dtype, jnp.floating):
            if target.shape == outputs.shape[:-1]:
                return wide(target)
        elif target.shape == outputs.shape and outputs.ndim > 1:
            return jnp.argmax(target, -1)
    raise DataError(
        f"no choice between classes: outputs of shape {outputs.shape}, a target {target.dtype}{list(target.shape)}. "
        f"Outputs (..., 2 or more classes) need class labels of shape {outputs.shape[:-1]}, integers, or probabilities "
        f"of shape {outputs.shape}, floats. For independent labels there are sigmoid_cross_entropy and the metrics "
        f"binary_accuracy, binary_precision, ...; for numbers squared_error and mean_absolute_error"
    )


def wide(target: jax.Array) -> jax.Array:
    """Widen bool and integer labels below 32 bits to int32, so comparing uint8 labels with 256 does not wrap to 0.

    >>> wide(jnp.array([255], "uint8")) < 256
    Array([ True], dtype=bool)
    """
    if target.dtype == bool:
        return target.astype(jnp.int32)
    narrow = jnp.issubdtype(target.dtype, jnp.integer) and jnp.iinfo(target.dtype).bits < 32
    return target.astype(jnp.int32) if narrow else target


def namespace(x: Any) -> Any:
    """The module of functions for an array: `jax.numpy` for a JAX array or tracer, else `numpy`."""
    return jnp if isinstance(x, jax.Array) else np


def real(x: Any) -> Any:
    """Convert a sum or count to floats: float32 for a JAX array, float64 for a NumPy array.

    The conversion is explicit, because JAX may be set to raise an error for mixed dtypes.

    >>> real(np.int32([1, 2])).dtype, real(jnp.array([1, 2])).dtype
    (dtype('float64'), dtype('float32'))
    """
    return x.astype(jnp.float32) if isinstance(x, jax.Array) else np.asarray(x, np.float64)
