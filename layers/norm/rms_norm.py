"""RMS norm: each position's last dimension is divided by its root mean square.

The mean square is computed in float32 or wider; the result has the dtype of x.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.initializers import Initializer, ones
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.compute_once import compute_once
from sapwood.layers.norm.moments import affine, scale_and_bias, widen


def rms_norm(x: jax.Array, scale: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """Divide the last dimension of each position by its root mean square, then `* scale`.

    Takes x `(..., features)` and scale `(features,)`. Raises `InputError` for an x that is not floating.

    >>> rms_norm(jnp.array([3.0, 3.0]), jnp.array([1.0, 2.0]), eps=0.0)
    Array([1., 2.], dtype=float32)
    """
    x = compute_once(check_inputs.floating("rms_norm", x))
    wide = widen(x)
    return affine(wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps), scale, None).astype(x.dtype)


class RMSNorm(Layer):
    """Divide the features of each position by their root mean square: `(..., features)` to the same.

    Parameter: `scale` (features,), unless `scale` is False. Raises `InputError` for an x that is not floating. Zhang
    and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).

    >>> RMSNorm(eps=0.0)({"scale": jnp.ones(2)}, jnp.array([3.0, -3.0]))
    Array([ 1., -1.], dtype=float32)
    """

    eps: float = 1e-6
    scale: bool = True
    scale_init: Initializer = ones

    def __post_init__(self) -> None:
        check_inputs.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("RMSNorm", x))
        check_inputs.at_least("RMSNorm", x, 1, "(..., features)")
        return rms_norm(x, scale_and_bias(self, v, x.shape[-1])[0], self.eps)
