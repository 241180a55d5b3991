"""All metrics by name and by kind of target, and the rules for the names of metrics.

A new metric is entered in `KINDS`; `METRICS` follows from it. `losses.KINDS` has the same keys.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError
from sapwood.metrics.accumulators import Metric
from sapwood.metrics.binary import (
    auc,
    binary_accuracy,
    binary_f1,
    binary_precision,
    binary_recall,
    subset_accuracy,
)
from sapwood.metrics.classification import accuracy, confusion, f1, perplexity, precision, recall, top_5_accuracy
from sapwood.metrics.regression import mean_absolute_error, mean_squared_error, r2, root_mean_squared_error

KINDS: Mapping[str, tuple[Callable[..., Metric], ...]] = {
    "classes": (accuracy, top_5_accuracy, perplexity, confusion, precision, recall, f1),
    "binary labels": (binary_accuracy, subset_accuracy, binary_precision, binary_recall, binary_f1, auc),
    "numbers": (mean_squared_error, mean_absolute_error, root_mean_squared_error, r2),
}
"""Metrics by what outputs and target mean: a choice between classes, independent binary labels, or numbers."""

METRICS: Mapping[str, Callable[..., Metric]] = {metric.__name__: metric for kind in KINDS.values() for metric in kind}
"""All metrics by name: ``metric(outputs, target, weight=None) -> Metric``."""

DEFAULT = {"classes": "accuracy", "binary labels": "binary_accuracy", "numbers": "mean_absolute_error"}
"""The name of the metric that an objective has by default, for each kind of loss."""

TAKEN = (
    "step", "epoch", "loss", "steps_per_second", "learning_rate", "plateau_scale", "gradient_norm", "auxiliary_loss",
    "skipped_steps", "checks",
)  # fmt: skip
"""Names of columns that `fit` and the training step write; no metric of an objective may have one of them."""


def resolve(metric: str | Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    """The name and function of a metric that is given by name or as a function.

    Raises `ConfigError` for an unknown name, with the nearest names, and for a function that does not take
    ``(outputs, target, weight)``.

    >>> resolve("r2") == ("r2", r2), resolve(functools.partial(f1, average="micro"))[0]
    (True, 'f1')
    """
    if callable(metric):
        check_takes("metric", metric, ("outputs", "target", "weight"), "Metric, or one value per example")
        function = plain(metric)
        return getattr(function, "__name__", type(function).__name__), metric
    if not isinstance(metric, str) or metric not in METRICS:
        raise ConfigError(
            f"no metric is called {metric!r}{migration_hints.answer(migration_hints.METRICS, str(metric), METRICS)} "
            f"(known: {', '.join(METRICS)}; or give a function (outputs, target, weight) -> Metric)"
        )
    return metric, METRICS[metric]


def check_takes(what: str, function: Callable[..., Any], names: tuple[str, ...], gives: str) -> None:
    """Raise `ConfigError` for a function that cannot be called with the given positional arguments.

    Args:
        what: what the error calls the function, "loss" or "metric".
        function: the function. One without a readable signature, such as some written in C, passes.
        names: the names of the arguments, for the message; their number is what is checked.
        gives: what the function should return, for the message.

    >>> check_takes("loss", lambda y: y, ("outputs", "target"), "one loss per example")
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: the loss <lambda>(y) does not take (outputs, target): too many positional \
arguments. A loss is a function (outputs, target) -> one loss per example
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        takes, function = f"({', '.join(names)})", plain(function)
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"the {what} {name}{signature} does not take {takes}: {error}. A {what} is a function {takes} -> {gives}"
        ) from None


def resolve_all(metrics: Any) -> tuple[tuple[str, Callable[..., Any]], ...]:
    """Names and functions of the metrics of `supervised`: one metric, a sequence, or a dict from name to metric.

    Raises `ConfigError` for a name that two metrics have or that `check_name` refuses.

    >>> [name for name, _ in resolve_all({"at_0.9": functools.partial(binary_recall, threshold=0.9)})]
    ['at_0.9']
    """
    if isinstance(metrics, Mapping):
        found = tuple((name, resolve(metric)[1]) for name, metric in metrics.items())
    else:
        several = metrics if isinstance(metrics, Sequence) and not isinstance(metrics, str) else (metrics,)
        found = tuple(map(resolve, several))
    names = [name for name, _ in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"two metrics are called {twice!r}; name them, as in metrics={{'{twice}_1': ..., '{twice}_2': ...}}"
        )
    for name in names:
        check_name(name)
    return found


def check_name(name: Any, allowed: Sequence[str] = ()) -> None:
    """Raise `ConfigError` if no metric may have this name, because a row of `fit` has a column of that name.

    ``allowed`` are names in `TAKEN` that pass all the same.
    """
    if not isinstance(name, str):
        raise ConfigError(f"a metric is named by a string, got {name!r}")
    if (name in TAKEN and name not in allowed) or name.startswith("validation_"):
        raise ConfigError(
            f"a metric cannot be called {name!r}, which is a column of its own in the rows of fit; give it another "
            f"name, such as metrics={{'my_{name}': ...}}"
        )


def default(kind: str | None) -> tuple[str, ...]:
    """The names of the default metrics for a loss of this kind; none for an unknown kind.

    >>> default("numbers"), default(None)
    (('mean_absolute_error',), ())
    """
    return (DEFAULT[kind],) if kind in DEFAULT else ()


def plain(function: Any) -> Any:
    """The function inside `functools.partial`, however deeply nested; any other function unchanged.

    >>> plain(functools.partial(f1, average="micro")) is f1
    True
    """
    while isinstance(function, functools.partial):
        function = function.func
    return function


def kind(metric: Callable[..., Any]) -> str | None:
    """The key of `KINDS` that a metric belongs to; None for a custom function.

    >>> kind(r2)
    'numbers'
    """
    return next((name for name, metrics in KINDS.items() if plain(metric) in metrics), None)
