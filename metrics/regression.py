"""Metrics of numbers: outputs against a target of the same shape (examples,) or (..., outputs)."""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.metrics.accumulators import Mean, Metric
from sapwood.metrics.shapes import column_weight, columns, namespace, same_shape


def mean_squared_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The mean of ``(outputs - target) ** 2``."""
    same_shape("mean_squared_error", outputs, target)
    return Mean.of(_error(outputs, target) ** 2, weight)


def mean_absolute_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The mean of ``|outputs - target|``."""
    same_shape("mean_absolute_error", outputs, target)
    return Mean.of(abs(_error(outputs, target)), weight)


class RootMean(Metric):
    """The square root of a mean for each of several outputs (outputs,), and the mean of those."""

    total: Any
    weight: Any

    def compute(self) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            return ((self.total / self.weight) ** 0.5).mean()


def root_mean_squared_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> RootMean:
    """The square root of the mean of ``(outputs - target) ** 2``; of several outputs the mean of their roots.

    >>> outputs, target = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.zeros((2, 2))
    >>> round(float(root_mean_squared_error(outputs, target).compute()), 4)  # (sqrt(9 / 2) + sqrt(16 / 2)) / 2
    2.4749
    """
    same_shape("root_mean_squared_error", outputs, target)
    square = columns(_error(outputs, target) ** 2)
    each = _each(weight, outputs.shape)
    return RootMean(_sum(square, each), jnp.sum(each, 0))


class R2(Metric):
    """Sums about a centre near the mean of the target, for each output (outputs,): about zero they would cancel.

    ``first`` and ``second`` are of ``target - centre`` and its square, ``residual`` of the squared error. (Chan, Golub
    and LeVeque 1983, "Algorithms for computing the sample variance".)
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
        """The same sums about another centre."""
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

    Of several outputs the mean. Where the target is constant it is 1 for outputs without an error, else 0, as in
    scikit-learn. It holds for a target far from zero, too.

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
    centre = jnp.where(weight == 0, 0, jnp.clip(mean, low, high))  # of a constant target the constant itself
    away = target - centre[None]
    return R2(weight, centre, _sum(away, each), _sum(away**2, each), _sum((target - outputs) ** 2, each))


def _error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    return outputs.astype(jnp.float32) - target.astype(jnp.float32)


def _each(weight: Any, shape: tuple[int, ...]) -> jax.Array:
    each = column_weight(weight, shape)
    if each is None:
        return jnp.ones((math.prod(shape[:-1] if len(shape) > 1 else shape), 1))
    return each.astype(jnp.float32)


def _sum(values: jax.Array, each: jax.Array) -> jax.Array:
    """The weighted sum of each column; what weighs nothing does not count, NaN or not."""
    return jnp.sum(jnp.where(each != 0, values, 0) * each, 0)
