"""`contained`: what a mask leaves out may hold anything, and neither a result nor a gradient has any of it."""

import jax
import jax.numpy as jnp

from sapwood.core.errors import InputError
from sapwood.core.layer import describe


def contained(x: jax.Array, counts: jax.Array | bool) -> jax.Array:
    """x with zeros for what is not finite and does not count; `counts` is boolean and broadcasts to x.

    To leave an entry out of a sum is not enough: its gradient is multiplied by 0, and 0 x inf is NaN. A gradient ends
    at the entries that are replaced here.

    >>> contained(jnp.array([1.0, jnp.inf, jnp.nan, 2.0]), jnp.array([True, True, False, False]))
    Array([ 1., inf,  0.,  2.], dtype=float32)
    """
    return jnp.where(counts | jnp.isfinite(x), x, jnp.zeros_like(x, shape=()))


def leading(who: str, mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask over the leading dimensions of x, in a form that broadcasts to it; or an `InputError`.

    >>> leading("BatchNorm", jnp.array([True, False]), jnp.ones((2, 5, 3))).shape
    (2, 1, 1)
    """
    mask = jnp.asarray(mask)
    if mask.dtype != bool or not 0 < mask.ndim < x.ndim or mask.shape != x.shape[: mask.ndim]:
        raise InputError(
            f"{who} expects a boolean mask over the leading dimensions of x, such as (batch,), got "
            f"mask {describe(mask)} for x {describe(x)}"
        )
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
