"""From losses per example to one number: masks, weights and the mean."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sapwood.core.errors import ConfigError
from sapwood.metrics import Mean, lead

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def as_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def check_option(loss: str, name: str, value: Any, least: float, most: float, expected: str) -> None:
    if isinstance(value, numbers.Real) and not least <= float(value) <= most:
        raise ConfigError(f"{loss}({name}={value}): {expected} is expected")


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
