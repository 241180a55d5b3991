"""Losses: functions ``loss(outputs, target) -> per-example losses``, in float32, from optax where optax has them.

A loss keeps the batch's shape; `reduce` turns it into one number under a mask or weights. What would be misread in
silence, such as a label outside the classes, which indexing clamps, is flagged by `check` on the device.
"""

import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapwood.core import foreign
from sapwood.core.errors import ConfigError, DataError
from sapwood.train import metrics as metrics_
from sapwood.train.metrics import Mean, lead, same_shape, wide

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _classes(what: str, logits: jax.Array, target: jax.Array) -> bool:
    """Whether the target is class labels (...) for logits (..., classes); False for one probability per class."""
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise DataError(
            f"{what}: one output is no choice between classes, its softmax is always 1, but the logits have shape "
            f"{logits.shape}; for yes or no take sigmoid_cross_entropy, for a number squared_error"
        )
    if jnp.issubdtype(target.dtype, jnp.integer) and target.shape == logits.shape[:-1]:
        return True
    if jnp.issubdtype(target.dtype, jnp.floating) and target.shape == logits.shape:
        return False
    raise DataError(
        f"{what}: logits of shape {logits.shape} need integer labels of shape {logits.shape[:-1]} or "
        f"probabilities of shape {logits.shape}, got {target.dtype}{list(target.shape)}"
    )


def _option(loss: str, name: str, value: Any, least: float, most: float, expected: str) -> None:
    if isinstance(value, numbers.Real) and not least <= float(value) <= most:
        raise ConfigError(f"{loss}({name}={value}): {expected} is expected")


def softmax_cross_entropy(logits: jax.Array, target: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of ``softmax(logits)``.

    ``logits`` (..., classes) with integer ``target`` (...) or probabilities (..., classes) give float32 losses (...).
    ``label_smoothing`` mixes the target with the uniform distribution (Szegedy et al. 2016, arXiv:1512.00567).
    Raises `DataError` for shapes that do not fit, `ConfigError` for a smoothing that is no share from 0 to 1.

    >>> [round(x, 4) for x in softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).tolist()]
    [1.3863, 1.3863]
    """
    _option("softmax_cross_entropy", "label_smoothing", label_smoothing, 0, 1, "a share from 0 to 1")
    logits, target = _float32(logits), wide(target)
    if _classes("softmax_cross_entropy", logits, target):
        if not label_smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, target)
        target = jax.nn.one_hot(target, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(_float32(target), label_smoothing))


def sigmoid_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy of ``sigmoid(logits)`` with a target between 0 and 1; all of one shape (...).

    >>> [round(x, 4) for x in sigmoid_cross_entropy(jnp.zeros(2), jnp.array([0, 1])).tolist()]
    [0.6931, 0.6931]
    """
    same_shape("sigmoid_cross_entropy", logits, target)
    return optax.sigmoid_binary_cross_entropy(_float32(logits), _float32(target))


def focal(logits: jax.Array, target: jax.Array, gamma: float = 2.0) -> jax.Array:
    """Focal loss of ``sigmoid(logits)`` (Lin et al. 2017, arXiv:1708.02002); all of one shape (...).

    Raises `ConfigError` for a ``gamma`` below 0, which would weigh down what is wrong.

    >>> [round(x, 4) for x in focal(jnp.zeros(1), jnp.ones(1)).tolist()]
    [0.1733]
    """
    _option("focal", "gamma", gamma, 0, math.inf, "0, or a number above")
    same_shape("focal", logits, target)
    return optax.sigmoid_focal_loss(_float32(logits), _float32(target), gamma=gamma)


def squared_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """``(outputs - target) ** 2``, all of one shape.

    >>> squared_error(jnp.array([1., 2.]), jnp.array([1., 4.])).tolist()
    [0.0, 4.0]
    """
    same_shape("squared_error", outputs, target)
    return optax.squared_error(_float32(outputs), _float32(target))


def absolute_error(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """``|outputs - target|``, all of one shape.

    >>> absolute_error(jnp.array([1., 2.]), jnp.array([1., 4.])).tolist()
    [0.0, 2.0]
    """
    same_shape("absolute_error", outputs, target)
    return jnp.abs(_float32(outputs) - _float32(target))


def huber(outputs: jax.Array, target: jax.Array, delta: float = 1.0) -> jax.Array:
    """Quadratic up to ``delta``, linear beyond (Huber 1964); all of one shape.

    Raises `ConfigError` for a ``delta`` that is not above 0.

    >>> huber(jnp.array([0.5, 3.0]), jnp.zeros(2)).tolist()
    [0.125, 2.5]
    """
    _option("huber", "delta", delta, sys.float_info.min, math.inf, "a number above 0")
    same_shape("huber", outputs, target)
    return optax.huber_loss(_float32(outputs), _float32(target), delta=delta)


def log_cosh(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """``log(cosh(outputs - target))``, all of one shape.

    >>> log_cosh(jnp.ones(1), jnp.ones(1)).tolist()
    [0.0]
    """
    same_shape("log_cosh", outputs, target)
    return optax.log_cosh(_float32(outputs), _float32(target))


def hinge(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """``max(0, 1 - outputs * target)`` for a target of -1 and 1, numbers of any type; all of one shape.

    Labels 0 and 1 are written ``2 * target - 1``; `supervised` refuses them as they are.

    >>> hinge(jnp.array([0.5, -2.0]), jnp.array([1, 1])).tolist()
    [0.5, 3.0]
    """
    same_shape("hinge", outputs, target)
    return optax.hinge_loss(_float32(outputs), _float32(target))


def kl_divergence(log_probabilities: jax.Array, target: jax.Array) -> jax.Array:
    """KL divergence of ``target`` (..., classes) from ``exp(log_probabilities)`` (..., classes): losses (...).

    Logits become log-probabilities by `jax.nn.log_softmax`; `supervised` refuses them as they are.

    >>> kl_divergence(jnp.log(jnp.full((1, 2), 0.5)), jnp.full((1, 2), 0.5)).tolist()
    [0.0]
    """
    same_shape("kl_divergence", log_probabilities, target)
    return optax.kl_divergence(_float32(log_probabilities), _float32(target))


def cosine_distance(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """One minus the cosine of the angle between vectors (..., features): losses (...).

    >>> cosine_distance(jnp.array([[1., 0.]]), jnp.array([[0., 2.]])).tolist()
    [1.0]
    """
    same_shape("cosine_distance", outputs, target)
    return optax.cosine_distance(_float32(outputs), _float32(target), epsilon=1e-8)


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
"""Losses by what they take outputs and target for, in the words of `train.metrics.KINDS`."""


def resolve(loss: str | Loss) -> Loss:
    """A loss given by name or as a function; `ConfigError` with the nearest names.

    >>> resolve("huber") is huber
    True
    """
    if callable(loss):
        metrics_.check_takes("loss", loss, ("outputs", "target"), "one loss per example")
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ConfigError(
            f"no loss is called {loss!r}{foreign.answer(foreign.LOSSES, str(loss), LOSSES)} "
            f"(known: {', '.join(LOSSES)}; or give a function (outputs, target) -> per-example losses)"
        )
    return LOSSES[loss]


def kind(loss: Loss) -> str | None:
    """What a loss takes the outputs for; None for a function of one's own, and for `cosine_distance`.

    >>> import functools
    >>> kind(functools.partial(huber, delta=2.0))
    'numbers'
    """
    return next((name for name, losses in KINDS.items() if metrics_.plain(loss) in losses), None)


def example_weight(batch: Mapping[str, Any]) -> jax.Array | None:
    """What each example counts: ``batch["mask"]`` times ``batch["weight"]``, whichever are there; None for neither."""
    mask, weight = batch.get("mask"), batch.get("weight")
    if mask is None or weight is None:
        return mask if weight is None else jnp.asarray(weight)
    mask, weight = jnp.asarray(mask), jnp.asarray(weight)
    wide = max(mask, weight, key=lambda x: x.ndim).shape
    dtype = weight.dtype if mask.dtype in (bool, weight.dtype) else jnp.float32
    return lead(mask, wide).astype(dtype) * lead(weight, wide).astype(dtype)


def contained(tree: Any, weight: jax.Array | None) -> Any:
    """``tree`` (batch, ...) with zeros for what is not finite where the weight is 0, as a target that is missing.

    To leave its loss out is not enough: the gradient would be 0 x NaN, which is NaN for all parameters.

    >>> contained(jnp.array([1., jnp.nan, jnp.nan]), jnp.array([True, True, False])).tolist()
    [1.0, nan, 0.0]
    """
    if weight is None:
        return tree

    def one(x: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating) or x.shape[: weight.ndim] != weight.shape:
            return x
        return jnp.where(lead(weight, x.shape).astype(bool) | jnp.isfinite(x), x, jnp.zeros_like(x, shape=()))

    return jax.tree.map(one, tree)


def reduce(losses: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, Mean]:
    """The mean of per-example losses (batch, ...) under a mask or weight, and the sums it is made of.

    A batch whose weights are all zero has loss 0, so that it adds nothing to an accumulated gradient.

    >>> loss, mean = reduce(jnp.array([1., 3., 5.]), jnp.array([1., 1., 0.]))
    >>> float(loss), float(mean.weight)
    (2.0, 2.0)
    """
    mean = Mean.of(losses, weight)
    return (mean.total / mean.weight if weight is None else of_mean(mean)), mean


def of_mean(mean: Mean) -> jax.Array:
    """The loss that a mean is: 0 where nothing counts, and no NaN in its gradient."""
    return mean.total / jnp.where(mean.weight == 0, 1, mean.weight)


def check(
    v: Any, loss: Loss, outputs: jax.Array, target: jax.Array, mask: jax.Array | None = None,
    kinds: Collection[str] = (),
) -> None:  # fmt: skip
    """Flag what ``loss`` would misread in silence, and metrics of other ``kinds``; where ``mask`` (or a weight)
    is zero, targets may hold anything."""
    function = metrics_.plain(loss)
    found = {kind(loss), *kinds}
    if "classes" in found and jnp.issubdtype(target.dtype, jnp.floating) and target.shape == outputs.shape:
        _flag(v, _distributions(target), DISTRIBUTION.format(target.shape[-1]), mask)
    elif "classes" in found:
        classes, target = outputs.shape[-1], wide(target)
        message = f"label outside the {classes} classes 0 to {classes - 1}"
        _flag(v, (target >= 0) & (target < classes), message, mask)
    if function is hinge:
        _flag(v, abs(_float32(target)) == 1, SIGNS, mask)
    elif "binary labels" in found:
        low = 0 if kind(loss) else -1
        _flag(v, (wide(target) >= low) & (wide(target) <= 1), f"target outside {low} to 1", mask)
    if function is kl_divergence:
        total = jax.nn.logsumexp(_float32(outputs), -1)
        _flag(v, abs(total) < 0.05, "outputs that are no log-probabilities; take jax.nn.log_softmax of logits", mask)


DISTRIBUTION = (
    "target that is no distribution over the {} classes: a row does not sum to 1; for independent labels take "
    "sigmoid_cross_entropy and binary metrics"
)
SIGNS = "target of hinge other than -1 and 1; labels 0 and 1 are written 2 * target - 1, or take sigmoid_cross_entropy"


def _distributions(target: jax.Array) -> jax.Array:
    """Which rows (..., classes) are at least 0 and sum to 1, to the accuracy of bfloat16."""
    return (jnp.min(target, -1) >= 0) & (abs(jnp.sum(_float32(target), -1) - 1) < 0.02)


def _flag(v: Any, ok: jax.Array, message: str, mask: Any) -> None:
    v.check(ok if mask is None else ok | ~lead(mask, ok.shape).astype(bool), message)
