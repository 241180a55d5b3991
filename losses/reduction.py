"""The reduction of per-example losses to one number, under masks and weights.

`example_weight` reads the weight from a batch, `contained` removes NaN from examples of weight 0, and `reduce` takes
the weighted mean. `as_float32` and `check_option` are shared by the files of losses.
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sapwood.core.errors import ConfigError
from sapwood.metrics import Mean, lead

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def as_float32(x: jax.Array) -> jax.Array:
    """Cast an array to float32, the dtype in which all losses are computed."""
    return x.astype(jnp.float32)


def check_option(loss: str, name: str, value: Any, least: float, most: float, expected: str) -> None:
    """Raise `ConfigError` if a number is below ``least`` or above ``most``. A traced value is not checked."""
    if isinstance(value, numbers.Real) and not least <= float(value) <= most:
        raise ConfigError(f"{loss}({name}={value}): {expected} is expected")


def example_weight(batch: Mapping[str, Any]) -> jax.Array | None:
    """The weight of each example: ``batch["mask"] * batch["weight"]``, or the one that is there; None for neither.

    If their shapes differ, such as `(batch, length)` and `(batch,)`, the product has the shape of more dimensions.

    >>> example_weight({"mask": jnp.array([True, False]), "weight": jnp.array([2.0, 3.0])}).tolist()
    [2.0, 0.0]
    """
    mask, weight = batch.get("mask"), batch.get("weight")
    if mask is None or weight is None:
        return mask if weight is None else jnp.asarray(weight)
    mask, weight = jnp.asarray(mask), jnp.asarray(weight)
    wide = max(mask, weight, key=lambda x: x.ndim).shape
    dtype = weight.dtype if mask.dtype in (bool, weight.dtype) else jnp.float32
    return lead(mask, wide).astype(dtype) * lead(weight, wide).astype(dtype)


def contained(tree: Any, weight: jax.Array | None) -> Any:
    """Replace NaN and infinity by 0 where the weight is 0, as for a missing target.

    Masking the loss is not enough: the gradient would be 0 * NaN, which is NaN for all parameters. ``tree`` is a pytree
    of arrays (batch, ...). Leaves that are not floats, or that do not start with the weight's shape, stay unchanged.

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
    """The mean of per-example losses (batch, ...) under a mask or weight, and its sums as a `Mean`.

    A batch whose weights are all 0 has loss 0, so it adds nothing to an accumulated gradient.

    >>> loss, mean = reduce(jnp.array([1., 3., 5.]), jnp.array([1., 1., 0.]))
    >>> float(loss), float(mean.weight)
    (2.0, 2.0)
    """
    mean = Mean.of(losses, weight)
    return (mean.total / mean.weight if weight is None else of_mean(mean)), mean


def of_mean(mean: Mean) -> jax.Array:
    """The value of a `Mean` as a loss: 0 if the sum of weights is 0, without NaN in its gradient."""
    return mean.total / jnp.where(mean.weight == 0, 1, mean.weight)
