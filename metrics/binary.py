"""Binary metrics: logits (..., labels) of independent binary labels against 0 and 1 of the same shape.

Logits of shape (examples,) or (examples, 1) are one label. A target may be bool, 0 and 1, -1 and 1, or a probability;
it is positive if it is above 0.5. A label is predicted if its probability, ``sigmoid(logit)``, is above ``threshold``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.metrics.accumulators import Mean, Metric, static
from sapwood.metrics.precision_recall import F1, Precision, Recall, check_average
from sapwood.metrics.shapes import column_weight, columns, namespace, same_shape


def binary_accuracy(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, threshold: float = 0.5
) -> Mean:
    """The fraction of labels that are predicted correctly. Each label of an example counts separately.

    Args:
        outputs: logits (..., labels), or (examples,) for one label.
        target: 0 and 1, bool, -1 and 1, or probabilities, of the same shape.
        weight: a mask or weights (batch, ...); None counts every example as 1.
        threshold: the probability above which a label is predicted.

    Raises:
        DataError: the shapes differ.
        ConfigError: the threshold is not between 0 and 1.

    >>> float(binary_accuracy(jnp.array([[2.0, -1.0], [1.0, 1.0]]), jnp.array([[1, 0], [1, 0]])).compute())
    0.75
    """
    return Mean.of(_right("binary_accuracy", outputs, target, threshold), weight)


def subset_accuracy(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, threshold: float = 0.5
) -> Mean:
    """The fraction of examples (..., labels) whose labels are all predicted correctly. Arguments as in
    `binary_accuracy`.

    >>> float(subset_accuracy(jnp.array([[2.0, -1.0], [1.0, 1.0]]), jnp.array([[1, 0], [1, 0]])).compute())
    0.5
    """
    right = _right("subset_accuracy", outputs, target, threshold)
    return Mean.of(right if right.ndim == 1 else right.all(-1), weight)


def binary_precision(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro",
    threshold: float = 0.5,
) -> Precision:  # fmt: skip
    """Precision: of the examples for which a label was predicted, the fraction that have it.

    To set an option of a metric in `supervised`, pass it as ``functools.partial(binary_precision, average=None)``.

    Args:
        outputs: logits (..., labels), or (examples,) for one label.
        target: 0 and 1, bool, -1 and 1, or probabilities, of the same shape.
        weight: a mask or weights (batch, ...); None counts every example as 1.
        average: over several labels "macro" (the mean over all of them), "micro", "weighted" or None, as in
            scikit-learn.
        threshold: the probability above which a label is predicted.

    Raises:
        ConfigError: another average, or a threshold that is not between 0 and 1.
        DataError: the shapes differ.

    >>> outputs, target = jnp.array([2.0, 1.0, -1.0, -2.0]), jnp.array([1, 0, 1, 0])
    >>> float(binary_precision(outputs, target).compute())
    0.5
    >>> float(binary_precision(outputs, target, threshold=0.8).compute())
    1.0
    """
    return _counts(Precision, outputs, target, weight, average, threshold)


def binary_recall(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro",
    threshold: float = 0.5,
) -> Recall:  # fmt: skip
    """Recall: of the examples that have a label, the fraction for which it was predicted. Arguments as in
    `binary_precision`.

    >>> float(binary_recall(jnp.array([2.0, 1.0, -1.0, -2.0]), jnp.array([1, 0, 1, 0]), threshold=0.1).compute())
    1.0
    """
    return _counts(Recall, outputs, target, weight, average, threshold)


def binary_f1(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro",
    threshold: float = 0.5,
) -> F1:  # fmt: skip
    """F1: the harmonic mean of precision and recall of a label. Arguments as in `binary_precision`.

    >>> float(binary_f1(jnp.array([2.0, 1.0, -1.0, -2.0]), jnp.array([1, 0, 1, 0])).compute())
    0.5
    """
    return _counts(F1, outputs, target, weight, average, threshold)


def _predicted(what: str, outputs: jax.Array, target: jax.Array, threshold: float) -> jax.Array:
    """Whether each label is predicted. The logits are compared with the logit of ``threshold``.

    Raises `DataError` if the shapes differ, `ConfigError` for a threshold that is not between 0 and 1.
    """
    same_shape(what, outputs, target)
    if not 0 < threshold < 1:
        raise ConfigError(f"{what}(threshold={threshold}): a probability between 0 and 1 is expected")
    return outputs > math.log(threshold / (1 - threshold))


def _positive(target: jax.Array) -> jax.Array:
    """Whether each target is positive: above 0.5."""
    return target.astype(jnp.float32) > 0.5


def _right(what: str, outputs: jax.Array, target: jax.Array, threshold: float) -> jax.Array:
    """Whether each label is predicted correctly."""
    return _predicted(what, outputs, target, threshold) == _positive(target)


def _counts(kind: type[Any], outputs: Any, target: Any, weight: Any, average: Any, threshold: float) -> Any:
    """The accumulator `kind` with each label's number of hits, predictions and positive examples."""
    what = f"binary_{kind.__name__.lower()}"
    check_average(what, average)
    chosen, true = columns(_predicted(what, outputs, target, threshold)), columns(_positive(target))
    each = column_weight(weight, outputs.shape)
    if each is not None and each.dtype != bool:
        each = each.astype(jnp.float32)  # float16 weights would be summed in float16
    sums = (jnp.sum(x if each is None else x & each if each.dtype == bool else jnp.where(x, each, 0), 0)
            for x in (chosen & true, chosen, true))  # fmt: skip
    return kind(*sums, average, absent=True)


class AUC(Metric):
    """The accumulator of `auc`: it keeps every score, so merging concatenates instead of adding.

    Attributes:
        score: the scores (examples, labels).
        positive: whether each label is positive, bool (examples, labels).
        weight: (examples, 1) or (examples, labels); None counts every example as 1.
        average: how several labels are averaged, as in `binary_precision`.
    """

    score: Any
    positive: Any
    weight: Any
    average: str | None = static("macro")

    def merge(self, other: "AUC") -> "AUC":
        return jax.tree.map(lambda one, two: namespace(one).concatenate([one, two]), self, other)

    def compute(self) -> Any:
        np_, weight = namespace(self.score), self.weight if self.weight is not None else np.True_
        weight = np_.broadcast_to(weight, self.score.shape).astype(float)  # int32 overflows on the device
        if self.average == "micro":
            return _area(self.score.ravel(), self.positive.ravel(), weight.ravel())
        each = zip(self.score.T, self.positive.T, weight.T, strict=True)
        areas = np_.stack([_area(score, positive, weight) for score, positive, weight in each])
        if self.average is None:
            return areas
        if self.average == "macro":
            return areas.mean()
        there = np_.where(self.positive, weight, 0).sum(0)
        total = there.sum()
        return (np_.where(there == 0, 0, areas) * there).sum() / np_.where(total == 0, 1, total)


def auc(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro") -> AUC:
    """Area under the ROC curve: the probability that a positive example has a larger score than a negative one.

    Equal scores count half (Hanley and McNeil 1982; Fawcett 2006, "An introduction to ROC analysis"). The area is
    exact, so the accumulator keeps every score, 6 bytes per example. It is NaN if a label has no positive or no
    negative example, or if a score is NaN.

    Args:
        outputs: scores (..., labels), or (examples,) for one label; logits or any others.
        target: 0 and 1, bool, -1 and 1, or probabilities, of the same shape.
        weight: a mask or weights (batch, ...); None counts every example as 1.
        average: how several labels are averaged, as in `binary_precision`.

    Raises:
        ConfigError: another average.
        DataError: the shapes differ.

    >>> float(auc(jnp.array([9.0, 8.5, 8.7, 8.0]), jnp.array([1, 1, 0, 0])).compute())
    0.75
    """
    same_shape("auc", outputs, target)
    check_average("auc", average)
    return AUC(columns(outputs), columns(_positive(target)), column_weight(weight, outputs.shape), average)


def _area(score: Any, positive: Any, weight: Any) -> Any:
    """The area of one label; all arguments are (examples,).

    Each positive example has a share: the fraction of the negative examples with a smaller score, plus half of the
    fraction with an equal score. The area is the mean of this share over the positive examples. Means and fractions are
    weighted.
    """
    np_ = namespace(score)
    order = np_.argsort(score)
    score, up, down = score[order], np_.where(positive, weight, 0)[order], np_.where(positive, 0, weight)[order]
    below = np_.concatenate([np_.zeros(1, down.dtype), down.cumsum()])
    under, upto = (below[np_.searchsorted(score, score, side=side)] for side in ("left", "right"))
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (up * ((under + upto) / (2 * below[-1]))).sum() / up.sum()
    return np_.where((np_.isnan(score) & (up + down > 0)).any(), np.nan, area)
