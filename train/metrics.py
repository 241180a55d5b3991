"""Metrics: small sums that merge exactly over batches of any size and any number of devices, and compute at the end.

google-metrax and clu were read first: metrax pulls in clu, flax, absl, etils, ml-collections and wrapt, its precision
and recall take no weights and its accuracy wants classes; clu reduces through `pmap`. So these few sums are our own.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.brief import in_brief
from sapwood.core.errors import ConfigError, DataError
from sapwood.core.paths import nearest


@dataclass_transform(frozen_default=True)
class Metric:
    """Base of all accumulators: a pytree of sums. A subclass becomes a frozen dataclass whose fields are arrays.

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
        Raises `DataError` when the weight's shape does not lead the values' shape.

        >>> float(Mean.of(jnp.array([1., 2., 60.]), jnp.array([True, True, False])).compute())
        1.5
        """
        values = values.astype(jnp.float32)
        if weight is None:
            return cls(jnp.sum(values), np.float32(values.size))
        weight = lead(weight, values.shape)
        inside = jnp.where(weight != 0, values, 0)
        total = jnp.sum(inside if weight.dtype == bool else inside * weight)
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


class RootMean(Mean):
    """The square root of a mean, e.g. of squared errors."""

    def compute(self) -> Any:
        return super().compute() ** 0.5


class ExpMean(Mean):
    """The exponential of a mean: perplexity, given the mean negative log-likelihood per token."""

    def compute(self) -> Any:
        return np.e ** super().compute()


class Confusion(Metric):
    """A confusion matrix ``counts`` (classes, classes), rows the true class, columns the predicted one."""

    counts: Any

    @classmethod
    def of(cls, outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Self:
        """Count ``argmax(outputs)`` (..., classes) against class labels (...)."""
        classes, target = outputs.shape[-1], labels(outputs, target)
        weight = jnp.ones((), jnp.float32) if weight is None else lead(weight, target.shape)
        weight = jnp.broadcast_to(weight.astype(jnp.float32), target.shape)
        cell = target * classes + jnp.argmax(outputs, -1)
        return cls(jnp.zeros(classes * classes).at[cell.ravel()].add(weight.ravel()).reshape(classes, classes))

    def compute(self) -> Any:
        return self.counts

    def _rates(self) -> tuple[Any, Any]:
        """Precision and recall per class; 0 where a class was never predicted, or never there (scikit-learn)."""
        hit, predicted, true = np.diagonal(self.counts), self.counts.sum(0), self.counts.sum(1)
        return hit / np.maximum(predicted, 1e-12), hit / np.maximum(true, 1e-12)


class Precision(Confusion):
    """Precision, the unweighted mean over classes ("macro")."""

    def compute(self) -> Any:
        return self._rates()[0].mean()


class Recall(Confusion):
    """Recall, the unweighted mean over classes: balanced accuracy."""

    def compute(self) -> Any:
        return self._rates()[1].mean()


class F1(Confusion):
    """F1 (van Rijsbergen 1979), the unweighted mean over classes."""

    def compute(self) -> Any:
        precision, recall = self._rates()
        return (2 * precision * recall / np.maximum(precision + recall, 1e-12)).mean()


class R2(Metric):
    """The coefficient of determination ``1 - residual / total`` from its sums about a fixed centre (0)."""

    weight: Any
    target: Any
    square: Any
    residual: Any

    @classmethod
    def of(cls, outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Self:
        outputs, target = outputs.astype(jnp.float32), target.astype(jnp.float32)
        same_shape("r2", outputs, target)
        means = [Mean.of(x, weight) for x in (target, target**2, (target - outputs) ** 2)]
        return cls(means[0].weight, *(mean.total for mean in means))

    def compute(self) -> Any:
        return 1 - self.residual / (self.square - self.target**2 / self.weight)


BINS = 1024


class AUC(Metric):
    """Area under the ROC curve from two histograms of ``sigmoid(score)`` in 1024 bins; ties within a bin count half.

    (Fawcett 2006, "An introduction to ROC analysis".) The error against the exact area is at most half the chance
    that a positive and a negative fall into one bin.
    """

    negative: Any
    positive: Any

    @classmethod
    def of(cls, outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Self:
        """Scores ``outputs`` (batch, ...) are logits; ``target`` of the same shape is 0 or 1."""
        same_shape("auc", outputs, target)
        weight = jnp.ones((), jnp.float32) if weight is None else lead(weight, target.shape)
        weight = jnp.broadcast_to(weight.astype(jnp.float32), target.shape).ravel()
        score = jax.nn.sigmoid(outputs.astype(jnp.float32)).ravel()
        bins = jnp.clip((score * BINS).astype(jnp.int32), 0, BINS - 1)
        positive = (target > 0.5).ravel()
        empty = jnp.zeros(BINS)
        return cls(empty.at[bins].add(weight * ~positive), empty.at[bins].add(weight * positive))

    def compute(self) -> Any:
        below = self.negative.cumsum() - self.negative / 2
        return (self.positive * below).sum() / (self.positive.sum() * self.negative.sum())


def lead(weight: Any, shape: tuple[int, ...]) -> jax.Array:
    """``weight`` (batch, ...) with trailing axes of 1, so that it broadcasts over ``shape`` (batch, ..., features)."""
    weight = jnp.asarray(weight)
    if weight.shape != tuple(shape[: weight.ndim]):
        raise DataError(
            f"a mask or weight of shape {weight.shape} does not lead the shape {tuple(shape)} of the "
            f"per-example values; give one number per example, or per position of each example"
        )
    return weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))


def same_shape(what: str, outputs: jax.Array, target: jax.Array) -> None:
    """Raise `DataError` unless both shapes agree (NumPy would broadcast (n, 1) against (n,) to (n, n))."""
    if outputs.shape != target.shape:
        raise DataError(
            f"{what} compares outputs and target element by element, but the outputs have shape "
            f"{outputs.shape} and the target {target.shape}; reshape one of them"
        )


def labels(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Class labels (...) from a target of class labels, or of one probability per class, for outputs (..., classes)."""
    if target.shape == outputs.shape and not jnp.issubdtype(target.dtype, jnp.integer):
        return jnp.argmax(target, -1)
    if target.shape != outputs.shape[:-1]:
        raise DataError(
            f"outputs of shape {outputs.shape} need class labels of shape {outputs.shape[:-1]} or "
            f"probabilities of shape {outputs.shape}, got {target.dtype}{list(target.shape)}"
        )
    return wide(target)


def wide(target: jax.Array) -> jax.Array:
    """Class labels in integers that hold every class: a comparison with 256 would make 0 of it for uint8.

    >>> wide(jnp.array([255], "uint8")) < 256
    Array([ True], dtype=bool)
    """
    narrow = jnp.issubdtype(target.dtype, jnp.integer) and jnp.iinfo(target.dtype).bits < 32
    return target.astype(jnp.int32) if narrow else target


def accuracy(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The share of examples whose largest output is the labelled class.

    >>> float(accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).compute())
    0.5
    """
    return Mean.of(jnp.argmax(outputs, -1) == labels(outputs, target), weight)


def top_5_accuracy(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The share of examples whose labelled class is among the five largest outputs."""
    best = jax.lax.top_k(outputs, min(5, outputs.shape[-1]))[1]
    return Mean.of(jnp.any(best == labels(outputs, target)[..., None], -1), weight)


def binary_accuracy(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The share of logits on the right side of zero, for a target of 0 and 1 of the same shape."""
    same_shape("binary_accuracy", outputs, target)
    return Mean.of((outputs > 0) == (target > 0.5), weight)


def mean_squared_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The mean of ``(outputs - target) ** 2``."""
    same_shape("mean_squared_error", outputs, target)
    return Mean.of((outputs.astype(jnp.float32) - target) ** 2, weight)


def mean_absolute_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The mean of ``|outputs - target|``."""
    same_shape("mean_absolute_error", outputs, target)
    return Mean.of(abs(outputs.astype(jnp.float32) - target), weight)


def root_mean_squared_error(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> RootMean:
    """The square root of the mean of ``(outputs - target) ** 2``."""
    mean = mean_squared_error(outputs, target, weight)
    return RootMean(mean.total, mean.weight)


def perplexity(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> ExpMean:
    """``exp`` of the mean cross-entropy of logits (..., vocab) against token ids (...)."""
    log_p = jax.nn.log_softmax(outputs.astype(jnp.float32))
    return ExpMean.of(-jnp.take_along_axis(log_p, labels(outputs, target)[..., None], -1)[..., 0], weight)


METRICS: Mapping[str, Callable[..., Metric]] = {
    "accuracy": accuracy,
    "top_5_accuracy": top_5_accuracy,
    "binary_accuracy": binary_accuracy,
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
    "root_mean_squared_error": root_mean_squared_error,
    "perplexity": perplexity,
    "confusion": Confusion.of,
    "precision": Precision.of,
    "recall": Recall.of,
    "f1": F1.of,
    "r2": R2.of,
    "auc": AUC.of,
}
"""Every metric by name: ``metric(outputs, target, weight=None) -> Metric``."""


def resolve(metric: str | Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """The name and function of a metric given by name or as a function; `ConfigError` with the nearest names."""
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric not in METRICS:
        raise ConfigError(
            f"no metric is called {metric!r}{nearest(str(metric), METRICS)} "
            f"(known: {', '.join(METRICS)}; or give a function (outputs, target, weight) -> Metric)"
        )
    return metric, METRICS[metric]


def as_metric(value: Any, weight: Any = 1.0) -> Metric:
    """A metric as it is; a scalar as a `Mean` that counts with ``weight``."""
    return value if isinstance(value, Metric) else Mean(value * weight, weight)


def merge(trees: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    """One dict of host accumulators from the dicts of several batches, in float64, where the sums of many batches stay
    exact (integers below 2**53). Scalars become the `Mean` over the batches.

    >>> merge([{"loss": 1.0, "hits": Mean(3.0, 4.0)}, {"loss": 2.0, "hits": Mean(1.0, 2.0)}])["hits"]
    Mean(total=4.0, weight=6.0)
    """
    return merge_stacked(jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees))


def merge_stacked(tree: dict[str, Any]) -> dict[str, Metric]:
    """`merge` of one dict whose leaves have a leading axis of batches."""
    return {name: _merge(value) for name, value in tree.items()}


def _merge(value: Any) -> Metric:
    if not isinstance(value, Metric):
        return Mean(_wide(value).sum(0), float(len(value)))
    if type(value).merge is Metric.merge:  # plain sums: leaf by leaf over all batches at once
        return jax.tree.map(lambda leaf: _wide(leaf).sum(0), value)
    each = [jax.tree.map(lambda leaf: _wide(leaf[i]), value) for i in range(len(jax.tree.leaves(value)[0]))]  # noqa: B023
    return functools.reduce(lambda left, right: left.merge(right), each)


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
