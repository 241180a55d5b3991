"""Accumulators: small sums that merge exactly over batches of any size and any number of devices.

google-metrax and clu were read first: metrax pulls in clu, flax, absl, etils, ml-collections and wrapt, its precision
and recall take no weights and its accuracy wants classes; clu reduces through `pmap`. So these few sums are our own.
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
    """A field of a `Metric` that is an option, not an array: the same in all accumulators that are merged."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True)
class Metric:
    """Base of all accumulators: a pytree of sums. A subclass becomes a frozen dataclass whose fields are arrays, or
    `static` options.

    `merge` adds the fields, so merging is exact in any order and split; `compute` turns the sums into the value.
    Both use operators alone, so they run on traced arrays, device arrays, and on the host in float64.

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
        """The accumulator of both sets of examples."""
        return jax.tree.map(operator.add, self, other)

    def compute(self) -> Any:
        """The value, of whatever was merged so far."""
        raise NotImplementedError(f"{type(self).__name__} needs a compute() method")


class Mean(Metric):
    """A weighted mean: the sum of ``weight * value`` and the sum of ``weight``."""

    total: Any
    weight: Any

    @classmethod
    def of(cls, values: jax.Array, weight: jax.Array | None = None) -> Self:
        """The mean of ``values`` (batch, ...) with ``weight`` None, or of shape (batch,), (batch, length), ...

        The weight may be a boolean mask or numbers; a value under weight zero does not count, NaN or not.
        One number is a mean already, of nothing says how many: give the values before it, or say what it counts,
        ``Mean.of(x, 32)``. Raises `ConfigError` for one alone, `DataError` when the weight's shape does not lead the
        values' shape.

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
        """``total / weight``; NaN where nothing was counted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total / self.weight


class Last(Metric):
    """The newest value: what a learning rate is at the end of an interval."""

    value: Any

    def merge(self, other: "Last") -> "Last":
        return other

    def compute(self) -> Any:
        return self.value


class ExpMean(Mean):
    """The exponential of a mean: perplexity, given the mean negative log-likelihood per token."""

    def compute(self) -> Any:
        return np.e ** super().compute()


def as_metric(value: Any, weight: Any = 1.0) -> Metric:
    """A metric as it is; a scalar as a `Mean` that counts with ``weight``."""
    return value if isinstance(value, Metric) else Mean(value * weight, weight)


def merge(trees: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    """One dict of host accumulators from the dicts of several batches, in float64, where the sums of many batches stay
    exact (integers below 2**53). Scalars become the `Mean` over the batches.

    >>> merge([{"loss": 1.0, "hits": Mean(3.0, 4.0)}, {"loss": 2.0, "hits": Mean(1.0, 2.0)}])["hits"]
    Mean(total=4.0, weight=6.0)
    """
    return {name: _merge([tree[name] for tree in trees]) for name in trees[0]}


def merge_stacked(tree: dict[str, Any]) -> dict[str, Metric]:
    """`merge` of one dict whose leaves have a leading axis of batches."""
    return {name: _merge_stacked(value) for name, value in tree.items()}


def _merge(values: list[Any]) -> Metric:
    if isinstance(values[0], Metric) and type(values[0]).merge is not Metric.merge:
        return _in_order([jax.tree.map(_wide, value) for value in values])
    return _merge_stacked(jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *values))


def _merge_stacked(value: Any) -> Metric:
    if not isinstance(value, Metric):
        return Mean(_wide(value).sum(0), float(len(value)))
    if type(value).merge is Metric.merge:  # plain sums: leaf by leaf over all batches at once
        return jax.tree.map(lambda leaf: _wide(leaf).sum(0), value)
    wide = jax.tree.map(_wide, value)
    return _in_order([jax.tree.map(operator.itemgetter(i), wide) for i in range(len(jax.tree.leaves(wide)[0]))])


def _in_order(each: list[Any]) -> Metric:
    while len(each) > 1:  # neighbours first: what grows by merging is copied log(n) times, not n
        pairs = zip(each[::2], each[1::2], strict=False)
        each = [left.merge(right) for left, right in pairs] + each[len(each) // 2 * 2 :]
    return each[0]


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def compute(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The values: Python floats where a metric is one number, NumPy arrays where it is more.

    >>> compute({"loss": Mean(6.0, 4.0)})
    {'loss': 1.5}
    """
    values = {name: np.asarray(as_metric(value).compute()) for name, value in metrics.items()}
    return {name: value.item() if value.ndim == 0 else value for name, value in values.items()}
