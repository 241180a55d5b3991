"""All losses by name and by kind of target, and the check of a batch's values against a loss.

A new loss is entered in `LOSSES` and, if its target is one of the three kinds, in `KINDS`. The kind decides which
values `check` flags and which metric an objective has by default.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sapwood import metrics as metrics_
from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError
from sapwood.losses.classification import focal, hinge, kl_divergence, sigmoid_cross_entropy, softmax_cross_entropy
from sapwood.losses.reduction import Loss, as_float32
from sapwood.losses.regression import absolute_error, cosine_distance, huber, log_cosh, squared_error
from sapwood.metrics import lead, wide

LOSSES: Mapping[str, Loss] = {
    loss.__name__: loss
    for loss in (softmax_cross_entropy, sigmoid_cross_entropy, focal, squared_error, absolute_error, huber, log_cosh,
                 hinge, kl_divergence, cosine_distance)
}  # fmt: skip
"""Every loss by name."""


KINDS: Mapping[str, tuple[Loss, ...]] = {
    "classes": (softmax_cross_entropy, kl_divergence),
    "binary labels": (sigmoid_cross_entropy, focal, hinge),
    "numbers": (squared_error, absolute_error, huber, log_cosh),
}
"""Losses by what their outputs and target mean: a choice between classes, independent binary labels, or numbers. The
keys are those of `sapwood.metrics.KINDS`."""


def resolve(loss: str | Loss) -> Loss:
    """The loss function of a name; a function is returned unchanged.

    Raises `ConfigError` for an unknown name, with the nearest names, and for a function that does not take
    ``(outputs, target)``.

    >>> resolve("huber") is huber
    True
    """
    if callable(loss):
        metrics_.check_takes("loss", loss, ("outputs", "target"), "one loss per example")
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ConfigError(
            f"no loss is called {loss!r}{migration_hints.answer(migration_hints.LOSSES, str(loss), LOSSES)} "
            f"(known: {', '.join(LOSSES)}; or give a function (outputs, target) -> per-example losses)"
        )
    return LOSSES[loss]


def kind(loss: Loss) -> str | None:
    """The key of `KINDS` that a loss belongs to; None for a custom function and for `cosine_distance`.

    >>> import functools
    >>> kind(functools.partial(huber, delta=2.0))
    'numbers'
    """
    return next((name for name, losses in KINDS.items() if metrics_.plain(loss) in losses), None)


def check(
    v: Any, loss: Loss, outputs: jax.Array, target: jax.Array, mask: jax.Array | None = None,
    kinds: Collection[str] = (),
) -> None:  # fmt: skip
    """Flag values that ``loss``, or metrics of ``kinds``, would misread without an error.

    Args:
        v: the cursor whose `check` records one bit per check on the device.
        loss: the loss function.
        outputs: the model's outputs, (..., classes) for class labels, else of the target's shape.
        target: the target that the loss gets.
        mask: a mask or weight (batch, ...); positions where it is 0 are not checked. None checks all.
        kinds: the keys of `KINDS` that the metrics of the objective belong to.
    """
    function = metrics_.plain(loss)
    found = {kind(loss), *kinds}
    if "classes" in found and jnp.issubdtype(target.dtype, jnp.floating) and target.shape == outputs.shape:
        _flag(v, _distributions(target), DISTRIBUTION.format(target.shape[-1]), mask)
    elif "classes" in found:
        classes, target = outputs.shape[-1], wide(target)
        message = f"label outside the {classes} classes 0 to {classes - 1}"
        _flag(v, (target >= 0) & (target < classes), message, mask)
    if function is hinge:
        _flag(v, abs(as_float32(target)) == 1, SIGNS, mask)
    elif "binary labels" in found:
        low = 0 if kind(loss) else -1
        _flag(v, (wide(target) >= low) & (wide(target) <= 1), f"target outside {low} to 1", mask)
    if function is kl_divergence:
        total = jax.nn.logsumexp(as_float32(outputs), -1)
        _flag(v, abs(total) < 0.05, "outputs that are no log-probabilities; take jax.nn.log_softmax of logits", mask)


DISTRIBUTION = (
    "target that is no distribution over the {} classes: a row does not sum to 1; for independent labels take "
    "sigmoid_cross_entropy and binary metrics"
)


SIGNS = "target of hinge other than -1 and 1; labels 0 and 1 are written 2 * target - 1, or take sigmoid_cross_entropy"


def _distributions(target: jax.Array) -> jax.Array:
    """Whether each row (..., classes) is non-negative and sums to 1 within 0.02, the accuracy of bfloat16."""
    return (jnp.min(target, -1) >= 0) & (abs(jnp.sum(as_float32(target), -1) - 1) < 0.02)


def _flag(v: Any, ok: jax.Array, message: str, mask: Any) -> None:
    """Record a check that fails where ``ok`` is False and the mask is not 0."""
    v.check(ok if mask is None else ok | ~lead(mask, ok.shape).astype(bool), message)
