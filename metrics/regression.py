"""Regression metrics: outputs against a target of the same shape (examples,) or (..., outputs).

All compute in float32 and raise `DataError` if the shapes differ. A value whose weight is 0 does not count, even if it
is NaN.
"""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.metrics.accumulators import Mean, Metric
from sapwood.metrics.shapes import column_weight, columns, namespace, same_shape


def mean_squared_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The mean of ``(outputs - target) ** 2``.

    >>> float(mean_squared_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])).compute())
    2.0
    """
    same_shape("mean_squared_error", outputs, target)
    return Mean.of(_error(outputs, target) ** 2, weight)


def mean_absolute_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The mean of ``|outputs - target|``.

    >>> float(mean_absolute_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])).compute())
    1.0
    """
    same_shape("mean_absolute_error", outputs, target)
    return Mean.of(abs(_error(outputs, target)), weight)


class RootMean(Metric):
    """The accumulator of `root_mean_squared_error`: the square root of a mean per output, then the mean of the roots.

    ``total`` (outputs,) is the weighted sum of values, ``weight`` the sum of weights, of a shape that broadcasts to it.
    """

    total: Any
    weight: Any

    def compute(self) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((self.total / self.weight) ** 0.5).mean()


def root_mean_squared_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> RootMean:
    """The square root of the mean of ``(outputs - target) ** 2``; for several outputs, the mean of their roots.

    >>> outputs, target = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.zeros((2, 2))
    >>> round(float(root_mean_squared_error(outputs, target).compute()), 4)  # (sqrt(9 / 2) + sqrt(16 / 2)) / 2
    2.4749
    """
    same_shape("root_mean_squared_error", outputs, target)
    square = columns(_error(outputs, target) ** 2)
    each = _each(weight, outputs.shape)
    return RootMean(_sum(square, each), jnp.sum(each, 0))


class R2(Metric):
    """The accumulator of `r2`. Each field has one entry per output (outputs,), or broadcasts to that.

    The target's sums are taken about a center near its mean, since sums about 0 lose digits by cancellation if the mean
    is large (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").

    Attributes:
        weight: the sum of weights.
        centre: the center, close to the mean of the target.
        first: the weighted sum of ``target - centre``.
        second: the weighted sum of ``(target - centre) ** 2``.
        residual: the weighted sum of ``(target - outputs) ** 2``.
    """

    weight: Any
    centre: Any
    first: Any
    second: Any
    residual: Any

    def merge(self, other: Self) -> Self:
        weight = self.weight + other.weight
        centre = self.centre + (other.centre - self.centre) * (
            other.weight / namespace(weight).where(weight == 0, 1, weight)
        )
        one, two = self.about(centre), other.about(centre)
        return type(self)(weight, centre, one.first + two.first, one.second + two.second, one.residual + two.residual)

    def about(self, centre: Any) -> Self:
        """The same accumulator with its sums converted to another center."""
        by = self.centre - centre
        second = self.second + by * (2 * self.first + by * self.weight)
        return type(self)(self.weight, centre, self.first + by * self.weight, second, self.residual)

    def compute(self) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            total = self.second - self.first**2 / self.weight
        flat = total == 0
        where = namespace(flat).where
        each = where(flat, where(self.residual == 0, 1.0, 0.0), 1 - self.residual / where(flat, 1, total))
        return each.mean()


def r2(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> R2:
    """The coefficient of determination, ``1 - sum((target - outputs) ** 2) / sum((target - target.mean()) ** 2)``.

    For several outputs it is the mean over them. For a constant target it is 1 if the outputs have no error, else 0, as
    in scikit-learn. It stays accurate for a target whose mean is far from 0.

    >>> target = jnp.array([20000.0, 20001.0, 20002.0, 20003.0])
    >>> round(float(r2(target + jnp.array([0.5, -0.5, 0.5, -0.5]), target).compute()), 4)
    0.8
    """
    same_shape("r2", outputs, target)
    each = _each(weight, outputs.shape)
    outputs, target = columns(outputs.astype(jnp.float32)), columns(target.astype(jnp.float32))
    weight, counts = jnp.sum(each, 0), each != 0
    mean = _sum(target, each) / jnp.where(weight == 0, 1, weight)
    low, high = (jnp.min(jnp.where(counts, sign * target, jnp.inf), 0) * sign for sign in (1, -1))
    centre = jnp.where(weight == 0, 0, jnp.clip(mean, low, high))  # exact if the target is constant
    away = target - centre[None]
    return R2(weight, centre, _sum(away, each), _sum(away**2, each), _sum((target - outputs) ** 2, each))


def _error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """``outputs - target`` in float32."""
    return outputs.astype(jnp.float32) - target.astype(jnp.float32)


def _each(weight: Any, shape: tuple[int, ...]) -> jax.Array:
    """The float32 weight of each row of `columns` for values of this shape: (examples, 1) or (examples, outputs)."""
    each = column_weight(weight, shape)
    if each is None:
        return jnp.ones((math.prod(shape[:-1] if len(shape) > 1 else shape), 1))
    return each.astype(jnp.float32)


def _sum(values: jax.Array, each: jax.Array) -> jax.Array:
    """The weighted sum of each column. A value of weight 0 does not count, even if it is NaN."""
    return jnp.sum(jnp.where(each != 0, values, 0) * each, 0)
