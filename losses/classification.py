"""Classification losses: for one class per example, and for independent binary labels.

Shapes are checked here, when the function is called or traced. Values, such as labels outside the classes, are checked
on the device by `losses.check`.
"""

import math

import jax
import jax.numpy as jnp
import optax

from sapwood.core.errors import DataError
from sapwood.losses.reduction import as_float32, check_option
from sapwood.metrics import same_shape, wide


def _classes(what: str, logits: jax.Array, target: jax.Array) -> bool:
    """True if the target holds class labels (...) for logits (..., classes); False for one probability per class.

    Raises `DataError` for other shapes or dtypes, and for fewer than two classes.
    """
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


def softmax_cross_entropy(logits: jax.Array, target: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of ``softmax(logits)``.

    ``logits`` (..., classes) with integer ``target`` (...) or probabilities (..., classes) give float32 losses (...).
    ``label_smoothing`` mixes the target with the uniform distribution (Szegedy et al. 2016, arXiv:1512.00567).
    Raises `DataError` for shapes that do not fit, `ConfigError` for a smoothing outside 0 to 1.

    >>> [round(x, 4) for x in softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).tolist()]
    [1.3863, 1.3863]
    """
    check_option("softmax_cross_entropy", "label_smoothing", label_smoothing, 0, 1, "a share from 0 to 1")
    logits, target = as_float32(logits), wide(target)
    if _classes("softmax_cross_entropy", logits, target):
        if not label_smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, target)
        target = jax.nn.one_hot(target, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(as_float32(target), label_smoothing))


def sigmoid_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy of ``sigmoid(logits)`` with a target between 0 and 1.

    Logits, target and the float32 losses have one shape (...). Raises `DataError` if the shapes differ.

    >>> [round(x, 4) for x in sigmoid_cross_entropy(jnp.zeros(2), jnp.array([0, 1])).tolist()]
    [0.6931, 0.6931]
    """
    same_shape("sigmoid_cross_entropy", logits, target)
    return optax.sigmoid_binary_cross_entropy(as_float32(logits), as_float32(target))


def focal(logits: jax.Array, target: jax.Array, gamma: float = 2.0) -> jax.Array:
    """Focal loss of ``sigmoid(logits)`` with a target between 0 and 1 (Lin et al. 2017, arXiv:1708.02002).

    Logits, target and the float32 losses have one shape (...). A larger ``gamma`` gives examples that are predicted
    well less weight. Raises `DataError` if the shapes differ, `ConfigError` for a ``gamma`` below 0, which would give
    the wrong predictions less weight instead.

    >>> [round(x, 4) for x in focal(jnp.zeros(1), jnp.ones(1)).tolist()]
    [0.1733]
    """
    check_option("focal", "gamma", gamma, 0, math.inf, "0, or a number above")
    same_shape("focal", logits, target)
    return optax.sigmoid_focal_loss(as_float32(logits), as_float32(target), gamma=gamma)


def hinge(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Hinge loss ``max(0, 1 - outputs * target)`` for a target of -1 and 1, of any numeric dtype.

    Outputs, target and the float32 losses have one shape (...). Raises `DataError` if the shapes differ. Convert labels
    0 and 1 with ``2 * target - 1``; `supervised` flags a target other than -1 and 1.

    >>> hinge(jnp.array([0.5, -2.0]), jnp.array([1, 1])).tolist()
    [0.5, 3.0]
    """
    same_shape("hinge", outputs, target)
    return optax.hinge_loss(as_float32(outputs), as_float32(target))


def kl_divergence(log_probabilities: jax.Array, target: jax.Array) -> jax.Array:
    """KL divergence of ``target`` (..., classes) from ``exp(log_probabilities)`` (..., classes): float32 losses (...).

    Convert logits with `jax.nn.log_softmax`; `supervised` flags outputs that are not log-probabilities. Raises
    `DataError` if the shapes differ.

    >>> kl_divergence(jnp.log(jnp.full((1, 2), 0.5)), jnp.full((1, 2), 0.5)).tolist()
    [0.0]
    """
    same_shape("kl_divergence", log_probabilities, target)
    return optax.kl_divergence(as_float32(log_probabilities), as_float32(target))
