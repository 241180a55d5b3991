"""Layer norm: each position is normalized over its last dimension.

Statistics are computed in float32 or wider; the result has the dtype of x.
"""

import jax
from jax import lax

from sapwood.core.initializers import Initializer, ones
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.compute_once import compute_once
from sapwood.layers.norm.moments import affine, moments, scale_and_bias, widen


def layer_norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, eps: float = 1e-5
) -> jax.Array:
    """Normalize the last dimension of each position to mean 0 and variance 1, then `* scale + bias`.

    Args:
        x: `(..., features)`, floating.
        scale, bias: `(features,)`; None leaves one out.
        eps: added to the variance.

    Raises:
        InputError: x is not floating.

    >>> import jax.numpy as jnp
    >>> layer_norm(jnp.array([1.0, 3.0]), eps=0.0)
    Array([-1.,  1.], dtype=float32)
    """
    x = compute_once(check_inputs.floating("layer_norm", x))
    mean, var = moments(x, (-1,))
    return affine((widen(x) - mean) * lax.rsqrt(var + eps), scale, bias).astype(x.dtype)


class LayerNorm(Layer):
    """Normalize the features of each position to mean 0 and variance 1: `(..., features)` to the same.

    Parameters: `scale`, `bias` (features,). Raises `InputError` for an x that is not floating.

    Args:
        eps: added to the variance, in [0, 1).
        scale, bias: whether the layer has each of these parameters.
        scale_init: initializer of `scale`.

    Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450).

    >>> import jax.numpy as jnp
    >>> LayerNorm(eps=0.0, scale=False)({"bias": jnp.ones(2)}, jnp.array([1.0, 3.0]))
    Array([0., 2.], dtype=float32)
    """

    eps: float = 1e-5
    scale: bool = True
    bias: bool = True
    scale_init: Initializer = ones

    def __post_init__(self) -> None:
        check_inputs.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("LayerNorm", x))
        check_inputs.at_least("LayerNorm", x, 1, "(..., features)")
        return layer_norm(x, *scale_and_bias(self, v, x.shape[-1]), self.eps)
