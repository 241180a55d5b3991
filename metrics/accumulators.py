"""Metric accumulators: pytrees of sums that merge exactly over batches of any size and any number of devices.

A training step returns accumulators; on the host, `merge` adds those of many batches in float64 and `compute` gives the
values. google-metrax and clu are not used: metrax depends on clu, flax, absl, etils, ml-collections and wrapt, its
precision and recall take no weights and its accuracy needs classes; clu reduces through `pmap`.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.short_repr import in_brief
from sapwood.metrics.shapes import lead


def static(default: Any) -> Any:
    """Declare a field of a `Metric` that is an option, not an array. Accumulators that are merged must agree in it."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True)
class Metric:
    """Base class of all accumulators: a pytree of sums.

    A subclass becomes a frozen dataclass whose fields are arrays, or `static` options. The inherited `merge` adds the
    fields, so the result does not depend on the order of the batches or on how the examples are split into batches.
    `compute` turns the sums into the value. A method that uses only Python operators, such as the inherited `merge`,
    works on traced arrays, on device arrays, and on NumPy arrays of float64 on the host.

    >>> class Range(Metric):
    ...     low: jax.Array
    ...     high: jax.Array
    ...     def merge(self, other):
    ...         return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high))
    ...     def compute(self):
    ...         return self.high - self.low
    >>> float(Range(1.0, 2.0).merge(Range(0.0, 1.5)).compute())
    2.0
    """

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        jax.tree_util.register_dataclass(cls)

    __repr__ = in_brief

    def merge(self, other: Self) -> Self:
        """The accumulator of the examples of `self` and the examples of `other` together."""
        return jax.tree.map(operator.add, self, other)

    def compute(self) -> Any:
        """The value of the metric over all examples that were merged so far."""
        raise NotImplementedError(f"{type(self).__name__} needs a compute() method")


class Mean(Metric):
    """A weighted mean: the sum of ``weight * value`` and the sum of ``weight``."""

    total: Any
    weight: Any

    @classmethod
    def of(cls, values: jax.Array, weight: jax.Array | None = None) -> Self:
        """The weighted mean of ``values`` (batch, ...), as sums in float32.

        ``weight`` is a boolean mask or numbers of shape (batch,), (batch, length), ...; None counts every value as 1. A
        value of weight 0 does not count, even if it is NaN.

        A single number without a weight is refused: it looks like a mean, and the number of examples in that mean is
        unknown. Pass the value of each example, or pass the number of examples as the weight, ``Mean.of(x, 32)``.

        Raises `ConfigError` for a single number without a weight, `DataError` if the values' shape does not start with
        the weight's shape.

        >>> float(Mean.of(jnp.array([1., 2., 60.]), jnp.array([True, True, False])).compute())
        1.5
        """
        values = values.astype(jnp.float32)
        if weight is None and values.ndim == 0:
            raise ConfigError(
                f"{cls.__name__}.of(x) takes a value for each example, (batch, ...), and got one number, which does "
                "not say how many it is a mean of: batches of other sizes, and micro-batches, would count the same. "
                "Give the values before their mean is taken, or how many there are, Mean.of(x, len(values))"
            )
        if weight is None:
            return cls(jnp.sum(values), np.float32(values.size))
        weight = lead(weight, values.shape)
        inside = jnp.where(weight.astype(bool), values, 0)
        total = jnp.sum(inside if weight.dtype == bool else inside * weight.astype(jnp.float32))
        return cls(total, jnp.sum(weight, dtype=jnp.float32) * (values.size // max(weight.size, 1)))

    def compute(self) -> Any:
        """``total / weight``; NaN if the sum of weights is 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total / self.weight


class Last(Metric):
    """The latest value, such as the learning rate at the end of a logging interval."""

    value: Any

    def merge(self, other: "Last") -> "Last":
        return other

    def compute(self) -> Any:
        return self.value


class ExpMean(Mean):
    """The exponential of a mean: perplexity, if the mean is the negative log-likelihood per token."""

    def compute(self) -> Any:
        return np.e ** super().compute()


def as_metric(value: Any, weight: Any = 1.0) -> Metric:
    """A `Metric` unchanged; a number as a `Mean` with this ``weight``."""
    return value if isinstance(value, Metric) else Mean(value * weight, weight)


def merge(trees: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    """Merge the dicts of accumulators of several batches into one, on the host in float64.

    In float64, sums of integers are exact below 2**53. A plain number in the dicts becomes the `Mean` over the batches.

    >>> merge([{"loss": 1.0, "hits": Mean(3.0, 4.0)}, {"loss": 2.0, "hits": Mean(1.0, 2.0)}])["hits"]
    Mean(total=4.0, weight=6.0)
    """
    return {name: _merge([tree[name] for tree in trees]) for name in trees[0]}


def merge_stacked(tree: dict[str, Any]) -> dict[str, Metric]:
    """The same as `merge`, for one dict whose leaves have a leading axis of batches."""
    return {name: _merge_stacked(value) for name, value in tree.items()}


def _merge(values: list[Any]) -> Metric:
    """Merge one metric of several batches."""
    if isinstance(values[0], Metric) and type(values[0]).merge is not Metric.merge:
        return _in_order([jax.tree.map(_wide, value) for value in values])
    return _merge_stacked(jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *values))


def _merge_stacked(value: Any) -> Metric:
    """Merge one metric whose leaves have a leading axis of batches."""
    if not isinstance(value, Metric):
        return Mean(_wide(value).sum(0), float(len(value)))
    if type(value).merge is Metric.merge:  # plain sums: leaf by leaf over all batches at once
        return jax.tree.map(lambda leaf: _wide(leaf).sum(0), value)
    wide = jax.tree.map(_wide, value)
    return _in_order([jax.tree.map(operator.itemgetter(i), wide) for i in range(len(jax.tree.leaves(wide)[0]))])


def _in_order(each: list[Any]) -> Metric:
    """Merge accumulators that define their own `merge`, keeping their order.

    Neighbors are merged in pairs, so an accumulator that grows by merging, such as `AUC`, is copied log(n) times.
    """
    while len(each) > 1:
        pairs = zip(each[::2], each[1::2], strict=False)
        each = [left.merge(right) for left, right in pairs] + each[len(each) // 2 * 2 :]
    return each[0]


def _wide(x: Any) -> np.ndarray:
    """A NumPy array on the host, floats as float64."""
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def compute(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the values of accumulators: a Python number for a metric of one value, else a NumPy array.

    >>> compute({"loss": Mean(6.0, 4.0)})
    {'loss': 1.5}
    """
    values = {name: np.asarray(as_metric(value).compute()) for name, value in metrics.items()}
    return {name: value.item() if value.ndim == 0 else value for name, value in values.items()}
