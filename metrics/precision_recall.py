"""Precision, recall and F1 from counts per class or per label, averaged as scikit-learn does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.metrics.accumulators import Metric, static
from sapwood.metrics.shapes import namespace, real

AVERAGES = ("macro", "micro", "weighted", None)


class Counts(Metric):
    """For each class or label (classes,) the weight of what was rightly predicted, of what was predicted, and of what
    was there.

    ``average`` is "macro" (the mean over classes), "micro" (one rate of the summed counts), "weighted" (the mean by
    what was there) or None (a rate for each). A rate of nothing is 0. The macro mean leaves out a class that was
    neither there nor predicted, unless ``absent``.
    """

    hit: Any
    predicted: Any
    actual: Any
    average: str | None = static("macro")
    absent: bool = static(False)

    def parts(self) -> tuple[Any, Any]:
        """Numerator and denominator of the rate."""
        raise NotImplementedError

    def compute(self) -> Any:
        (top, bottom), actual, predicted = map(real, self.parts()), real(self.actual), real(self.predicted)
        if self.average == "micro":
            return _share(top.sum(), bottom.sum())
        rate = _share(top, bottom)
        if self.average is None:
            return rate
        if self.average == "weighted":
            return _share((rate * actual).sum(), actual.sum())
        counted = real((predicted + actual > 0) | self.absent)
        with np.errstate(invalid="ignore"):  # NaN where nothing was counted
            return (rate * counted).sum() / counted.sum()


class Precision(Counts):
    """The share of what was predicted that was there."""

    def parts(self) -> tuple[Any, Any]:
        return self.hit, self.predicted


class Recall(Counts):
    """The share of what was there that was predicted."""

    def parts(self) -> tuple[Any, Any]:
        return self.hit, self.actual


class F1(Counts):
    """The harmonic mean of precision and recall (van Rijsbergen 1979)."""

    def parts(self) -> tuple[Any, Any]:
        return 2 * self.hit, self.predicted + self.actual


def _share(part: Any, whole: Any) -> Any:
    """``part / whole``; 0 of 0 is 0."""
    return part / namespace(whole).where(whole == 0, 1, whole)


def check_average(what: str, average: Any) -> None:
    """Raise `ConfigError` for an average that is not known."""
    if average not in AVERAGES:
        raise ConfigError(f"{what}(average={average!r}): one of {', '.join(map(repr, AVERAGES))} is expected")


def tally(index: jax.Array, size: int, weight: jax.Array | None) -> jax.Array:
    """How often each of 0 to ``size - 1`` stands in ``index`` (...), or the sum of its weights (...): (size,).

    Counts, under a mask too, are int32: adding ones to a float32 ends at 2**24. Sums of weights are taken in many
    pieces, since each addition to a large sum rounds. What is outside of the range is left out.

    >>> tally(jnp.array([0, 2, 2, -1]), 3, None).tolist()
    [1, 0, 2]
    """
    index = index.ravel()
    inside = jnp.where(index < 0, size, index)  # a negative index would count from the end
    if weight is None or weight.dtype == bool:
        each = jnp.ones(index.size, jnp.int32) if weight is None else weight.ravel().astype(jnp.int32)
        return jnp.zeros(size, jnp.int32).at[inside].add(each, mode="drop")
    pieces = max(1, min(index.size // 4096, 2**22 // size))
    each = jnp.zeros((pieces, size), jnp.float32)
    piece = jnp.arange(index.size) % pieces
    return jnp.sum(each.at[piece, inside].add(weight.ravel().astype(jnp.float32), mode="drop"), 0)
