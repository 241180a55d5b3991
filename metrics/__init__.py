"""Metrics: functions ``metric(outputs, target, weight=None) -> Metric``, one family per file.

A `Metric` is an accumulator: a pytree of sums that merges exactly over batches and devices. Its `compute` gives the
value. `METRICS` lists the metrics by name.
"""

from typing import TYPE_CHECKING, Any

from sapwood.core import migration_hints
from sapwood.metrics.accumulators import (
    ExpMean,
    Last,
    Mean,
    Metric,
    as_metric,
    compute,
    merge,
    merge_stacked,
    static,
)
from sapwood.metrics.binary import (
    AUC,
    auc,
    binary_accuracy,
    binary_f1,
    binary_precision,
    binary_recall,
    subset_accuracy,
)
from sapwood.metrics.classification import (
    Confusion,
    accuracy,
    confusion,
    f1,
    perplexity,
    precision,
    recall,
    top_5_accuracy,
)
from sapwood.metrics.precision_recall import F1, Precision, Recall
from sapwood.metrics.registry import (
    KINDS,
    METRICS,
    check_name,
    check_takes,
    default,
    kind,
    plain,
    resolve,
    resolve_all,
)
from sapwood.metrics.regression import (
    R2,
    RootMean,
    mean_absolute_error,
    mean_squared_error,
    r2,
    root_mean_squared_error,
)
from sapwood.metrics.shapes import labels, lead, same_shape, wide

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return migration_hints.missing("sapwood.metrics", migration_hints.METRICS, name, __all__)


__all__ = [
    "AUC", "F1", "KINDS", "METRICS", "R2", "Confusion", "ExpMean", "Last", "Mean", "Metric", "Precision", "Recall",
    "RootMean", "accuracy", "as_metric", "auc", "binary_accuracy", "binary_f1", "binary_precision", "binary_recall",
    "check_name", "check_takes", "compute", "confusion", "default", "f1", "kind", "labels", "lead",
    "mean_absolute_error", "mean_squared_error", "merge", "merge_stacked", "perplexity", "plain", "precision", "r2",
    "recall", "resolve", "resolve_all", "root_mean_squared_error", "same_shape", "static", "subset_accuracy",
    "top_5_accuracy", "wide",
]  # fmt: skip
