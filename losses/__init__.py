"""Losses: functions ``loss(outputs, target) -> per-example losses``, in float32, one family per file.

A loss keeps the batch dimensions; `reduce` averages the per-example losses under a mask or weights. `check` flags, on
the device, values that a loss would misread without an error, such as a label outside the classes.
`linear_cross_entropy` is the exception: it fuses the last linear layer with its loss and returns a named tuple.
"""

from typing import TYPE_CHECKING, Any

from sapwood.core import migration_hints
from sapwood.losses.classification import (
    focal,
    hinge,
    kl_divergence,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
)
from sapwood.losses.linear_head import linear_cross_entropy
from sapwood.losses.reduction import Loss, contained, example_weight, of_mean, reduce
from sapwood.losses.registry import KINDS, LOSSES, check, kind, resolve
from sapwood.losses.regression import absolute_error, cosine_distance, huber, log_cosh, squared_error

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return migration_hints.missing("sapwood.losses", migration_hints.LOSSES, name, __all__)


__all__ = [
    "KINDS", "LOSSES", "Loss", "absolute_error", "check", "contained", "cosine_distance", "example_weight", "focal",
    "hinge", "huber", "kind", "kl_divergence", "linear_cross_entropy", "log_cosh", "of_mean", "reduce", "resolve",
    "sigmoid_cross_entropy", "softmax_cross_entropy", "squared_error",
]  # fmt: skip
