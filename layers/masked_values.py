"""Masks of inputs: what masked entries hold reaches no result and no gradient.

`zero_masked_nonfinite` replaces their non-finite values, `broadcast_leading_mask` checks the shape of a mask. Masked
entries, such as padding, may hold any value, NaN and inf included.
"""

import jax
import jax.numpy as jnp

from sapwood.core.errors import InputError
from sapwood.core.layer import describe


def zero_masked_nonfinite(x: jax.Array, counts: jax.Array | bool) -> jax.Array:
    """Replace by 0 the entries of x that are not finite and that `counts` leaves out.

    `counts` is boolean and broadcasts to x. Leaving an entry out of a sum is not enough: its gradient is multiplied by
    0, and 0 x inf is NaN. No gradient passes through a replaced entry.

    >>> zero_masked_nonfinite(jnp.array([1.0, jnp.inf, jnp.nan, 2.0]), jnp.array([True, True, False, False]))
    Array([ 1., inf,  0.,  2.], dtype=float32)
    """
    return jnp.where(counts | jnp.isfinite(x), x, jnp.zeros_like(x, shape=()))


def broadcast_leading_mask(who: str, mask: jax.Array, x: jax.Array) -> jax.Array:
    """Check a mask over the leading dimensions of x, and reshape it so that it broadcasts to x.

    Raises `InputError` for a mask that is not boolean, or whose shape is not that of some, but not all, leading
    dimensions of x. `who` names the layer in the message.

    >>> broadcast_leading_mask("BatchNorm", jnp.array([True, False]), jnp.ones((2, 5, 3))).shape
    (2, 1, 1)
    """
    mask = jnp.asarray(mask)
    if mask.dtype != bool or not 0 < mask.ndim < x.ndim or mask.shape != x.shape[: mask.ndim]:
        raise InputError(
            f"{who} expects a boolean mask over the leading dimensions of x, such as (batch,), got "
            f"mask {describe(mask)} for x {describe(x)}"
        )
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
