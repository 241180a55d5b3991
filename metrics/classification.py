"""Classification metrics: outputs (..., classes) against class labels (...), or one probability per class.

Outputs are logits, or any scores whose largest entry is the predicted class; `perplexity` needs logits. A label outside
the classes counts as a wrong prediction. For independent binary labels see `metrics.binary`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sapwood.metrics.accumulators import ExpMean, Mean, Metric
from sapwood.metrics.precision_recall import F1, Precision, Recall, check_average, tally
from sapwood.metrics.shapes import labels, lead


def accuracy(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The fraction of examples whose largest output is the labeled class.

    >>> float(accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).compute())
    0.5
    """
    return Mean.of(jnp.argmax(outputs, -1) == labels(outputs, target), weight)


def top_5_accuracy(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Mean:
    """The fraction of examples whose labeled class is among the five largest outputs.

    >>> float(top_5_accuracy(jnp.arange(12.0).reshape(2, 6), jnp.array([0, 1])).compute())
    0.5
    """
    right = labels(outputs, target)[..., None]
    return Mean.of(jnp.any(jax.lax.top_k(outputs, min(5, outputs.shape[-1]))[1] == right, -1), weight)


def perplexity(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> ExpMean:
    """``exp`` of the mean cross-entropy of logits (..., classes) against labels (...) or probabilities (..., classes).

    It is NaN if a label that counts is outside the classes.

    >>> round(float(perplexity(jnp.zeros((2, 4)), jnp.array([0, 3])).compute()), 4)
    4.0
    """
    log_p = jax.nn.log_softmax(outputs.astype(jnp.float32))
    right = labels(outputs, target)
    if target.shape == outputs.shape:
        return ExpMean.of(-jnp.sum(jnp.where(target == 0, 0, target.astype(jnp.float32) * log_p), -1), weight)
    right = jnp.where(right < 0, outputs.shape[-1], right)  # else -1 is the last class, not NaN
    return ExpMean.of(-jnp.take_along_axis(log_p, right[..., None], -1, mode="fill")[..., 0], weight)


class Confusion(Metric):
    """The accumulator of `confusion`: ``counts`` (classes, classes), rows the true class, columns the predicted one."""

    counts: Any

    def compute(self) -> Any:
        return self.counts


def confusion(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> Confusion:
    """The confusion matrix (classes, classes): rows are the true classes, columns the predicted ones.

    Entries are int32 counts, or float32 sums of weights. An example whose label is outside the classes is left out.

    >>> confusion(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).compute().tolist()
    [[0, 0], [1, 1]]
    """
    classes, right = outputs.shape[-1], labels(outputs, target)
    cell = jnp.where((right < 0) | (right >= classes), -1, right * classes + jnp.argmax(outputs, -1))
    return Confusion(tally(cell, classes * classes, _each(weight, right)).reshape(classes, classes))


def precision(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro"
) -> Precision:
    """Precision: of the examples that were predicted to be of a class, the fraction that are.

    Args:
        outputs: (..., classes); the largest output is the predicted class.
        target: class labels (...), or one probability per class (..., classes).
        weight: a mask or weights (batch, ...); None counts every example as 1.
        average: "macro" (the mean over the classes that occur in the target or the predictions), "micro", "weighted" or
            None, as in scikit-learn. `functools.partial` sets it for `supervised`.

    Raises:
        ConfigError: another average.
        DataError: the shapes are not those of a choice between classes.

    >>> outputs = jnp.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
    >>> round(float(precision(outputs, jnp.array([0, 0, 1, 1])).compute()), 4)
    0.8333
    """
    return _counts(Precision, outputs, target, weight, average)


def recall(
    outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro"
) -> Recall:
    """Recall: of the examples of a class, the fraction that were predicted to be. Arguments as in `precision`.

    >>> outputs = jnp.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
    >>> float(recall(outputs, jnp.array([0, 0, 1, 1])).compute())
    0.75
    """
    return _counts(Recall, outputs, target, weight, average)


def f1(outputs: jax.Array, target: jax.Array, weight: jax.Array | None = None, average: str | None = "macro") -> F1:
    """F1: the harmonic mean of precision and recall of a class. Arguments as in `precision`.

    >>> outputs = jnp.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
    >>> round(float(f1(outputs, jnp.array([0, 0, 1, 1])).compute()), 4)
    0.7333
    """
    return _counts(F1, outputs, target, weight, average)


def _counts(kind: type[Any], outputs: Any, target: Any, weight: Any, average: Any) -> Any:
    """The accumulator `kind` with each class's number of hits, predictions and true examples, by one `tally`."""
    check_average(kind.__name__.lower(), average)
    right, chosen, classes = labels(outputs, target), jnp.argmax(outputs, -1), outputs.shape[-1]
    known = (right >= 0) & (right < classes)
    rows = [jnp.where(chosen == right, chosen, -1), classes + chosen, jnp.where(known, 2 * classes + right, -1)]
    each = _each(weight, right)
    each = None if each is None else jnp.stack([each] * 3)
    return kind(*tally(jnp.stack(rows), 3 * classes, each).reshape(3, classes), average)


def _each(weight: Any, right: jax.Array) -> jax.Array | None:
    """The weight broadcast to one value per label."""
    return None if weight is None else jnp.broadcast_to(lead(weight, right.shape), right.shape)
