"""Accumulators of precision, recall and F1: counts per class or per label, averaged as scikit-learn does.

`metrics.classification` and `metrics.binary` fill them. `tally` counts per class without losing digits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.metrics.accumulators import Metric, static
from sapwood.metrics.shapes import namespace, real

AVERAGES = ("macro", "micro", "weighted", None)


class Counts(Metric):
    """Base of `Precision`, `Recall` and `F1`: counts, or sums of weights, per class or label (classes,).

    A rate of 0 / 0 is 0.

    Attributes:
        hit: examples of the class that were predicted correctly (true positives).
        predicted: examples that were predicted to be of the class.
        actual: examples that are of the class.
        average: "macro" (the mean over classes), "micro" (one rate of the summed counts), "weighted" (the mean weighted
            by ``actual``) or None (one rate per class).
        absent: whether the macro mean includes a class that was neither predicted nor in the target.
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
        with np.errstate(invalid="ignore"):  # NaN if no class was counted
            return (rate * counted).sum() / counted.sum()


class Precision(Counts):
    """Precision: ``hit / predicted``."""

    def parts(self) -> tuple[Any, Any]:
        return self.hit, self.predicted


class Recall(Counts):
    """Recall: ``hit / actual``."""

    def parts(self) -> tuple[Any, Any]:
        return self.hit, self.actual


class F1(Counts):
    """F1: the harmonic mean of precision and recall, ``2 * hit / (predicted + actual)`` (van Rijsbergen 1979)."""

    def parts(self) -> tuple[Any, Any]:
        return 2 * self.hit, self.predicted + self.actual


def _share(part: Any, whole: Any) -> Any:
    """``part / whole``; 0 / 0 is 0."""
    return part / namespace(whole).where(whole == 0, 1, whole)


def check_average(what: str, average: Any) -> None:
    """Raise `ConfigError` for an average that is not in `AVERAGES`."""
    if average not in AVERAGES:
        raise ConfigError(f"{what}(average={average!r}): one of {', '.join(map(repr, AVERAGES))} is expected")


def tally(index: jax.Array, size: int, weight: jax.Array | None) -> jax.Array:
    """Count how often each of 0 to ``size - 1`` occurs in ``index`` (...), or sum its ``weight`` (...): (size,).

    Counts, with a mask too, are int32, because a float32 count stops growing at 2**24. Weights are summed in float32 in
    many partial sums, because each addition to a large sum rounds. An index outside the range is left out.

    >>> tally(jnp.array([0, 2, 2, -1]), 3, None).tolist()
    [1, 0, 2]
    """
    index = index.ravel()
    inside = jnp.where(index < 0, size, index)  # JAX counts a negative index from the end
    if weight is None or weight.dtype == bool:
        each = jnp.ones(index.size, jnp.int32) if weight is None else weight.ravel().astype(jnp.int32)
        return jnp.zeros(size, jnp.int32).at[inside].add(each, mode="drop")
    pieces = max(1, min(index.size // 4096, 2**22 // size))
    each = jnp.zeros((pieces, size), jnp.float32)
    piece = jnp.arange(index.size) % pieces
    return jnp.sum(each.at[piece, inside].add(weight.ravel().astype(jnp.float32), mode="drop"), 0)
