"""Group norm: each example is normalized over its positions and a group of its channels.

Statistics are computed in float32 or wider; the result has the dtype of x.
"""

import jax
from jax import lax

from sapwood.core.errors import InputError
from sapwood.core.initializers import Initializer, ones
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.norm.moments import affine, moments, scale_and_bias, widen


def group_norm(
    x: jax.Array, groups: int, scale: jax.Array | None = None, bias: jax.Array | None = None, eps: float = 1e-5
) -> jax.Array:
    """Normalize each example over all positions and the channels of each group, then `* scale + bias`.

    Args:
        x: `(batch, ..., channels)`, floating.
        groups: number of groups that the channels are divided into.
        scale, bias: `(channels,)`; None leaves one out.
        eps: added to the variance.

    Raises:
        InputError: x is not floating, or its channels do not divide into the groups.

    >>> import jax.numpy as jnp
    >>> group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    x = check_inputs.floating("group_norm", x)
    check_inputs.at_least("group_norm", x, 2, "(batch, ..., channels)")
    if x.shape[-1] % groups:
        raise InputError(f"group_norm: {x.shape[-1]} channels do not divide into groups={groups}: {describe(x)}")
    grouped = widen(x).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    mean, var = moments(grouped, (*range(1, x.ndim - 1), x.ndim))
    y = ((grouped - mean) * lax.rsqrt(var + eps)).reshape(x.shape)
    return affine(y, scale, bias).astype(x.dtype)


class GroupNorm(Layer):
    """Normalize each example over its positions and groups of channels: `(batch, ..., channels)` to the same.

    One group is layer norm over a whole example. As many groups as channels is instance norm. Parameters: `scale`,
    `bias` (channels,).

    Args:
        groups: number of groups that the channels are divided into.
        eps: added to the variance, in [0, 1).
        scale, bias: whether the layer has each of these parameters.
        scale_init: initializer of `scale`.

    Raises:
        InputError: the channels do not divide into the groups.

    Wu and He 2018, "Group Normalization" (arXiv:1803.08494).

    >>> import jax.numpy as jnp
    >>> GroupNorm(2, eps=0.0, scale=False, bias=False)({}, jnp.array([[1.0, 3.0, 10.0, 30.0]]))
    Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    groups: int = 32
    eps: float = 1e-5
    scale: bool = True
    bias: bool = True
    scale_init: Initializer = ones

    def __post_init__(self) -> None:
        check_inputs.positive(self, "groups")
        check_inputs.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("GroupNorm", x))
        check_inputs.at_least("GroupNorm", x, 2, "(batch, ..., channels)")
        return group_norm(x, self.groups, *scale_and_bias(self, v, x.shape[-1]), self.eps)
