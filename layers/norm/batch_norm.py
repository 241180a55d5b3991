"""Batch norm: each channel is normalized over all examples and positions, or by running statistics in eval mode.

`batch_norm` takes the statistics as arguments. `BatchNorm` computes them with `moments` and keeps their running
averages as state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.initializers import Initializer, ones, zeros
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars, frozen, is_declaring
from sapwood.layers import check_inputs
from sapwood.layers.compute_once import compute_once
from sapwood.layers.expand_rank import expand_rank
from sapwood.layers.masked_values import broadcast_leading_mask, zero_masked_nonfinite
from sapwood.layers.norm.moments import affine, moments, scale_and_bias, standardise, widen


def batch_norm(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias`, with statistics that the caller passes (`moments` computes them).

    Args:
        x: `(..., features)`, floating.
        mean, var: the statistics, usually `(features,)`; they broadcast to x.
        scale, bias: broadcast to x, usually `(features,)`; None leaves one out.
        eps: added to the variance.

    Raises:
        InputError: x is not floating.

    >>> batch_norm(jnp.array([[1.0], [3.0]]), jnp.array([2.0]), jnp.array([1.0]), eps=0.0)
    Array([[-1.],
           [ 1.]], dtype=float32)
    """
    x = check_inputs.floating("batch_norm", x)
    scale = (
        None if scale is None else compute_once(scale)
    )  # its gradient too: fusion into an optimizer changes its rounding
    gain = affine(lax.rsqrt(expand_rank(widen(var), x) + eps), scale, None)
    return standardise(widen(x), expand_rank(mean, x), gain, 0.0 if bias is None else expand_rank(bias, x)).astype(
        x.dtype
    )


class BatchNorm(Layer):
    """Normalize each channel over the batch and all positions: `(batch, ..., features)` to the same.

    In training it uses the batch's statistics, and updates the state `mean` and `var` (features,) by
    `running = momentum * running + (1 - momentum) * batch`. In eval mode, and where a trainer freezes the layer
    (`Trainer(trainable=)`), it uses the state, as in Keras. Parameters: `scale`, `bias` (features,). The variance is
    the biased one in both places, as in Keras.

    The call takes an optional `mask` (boolean, the leading dimensions of x, such as (batch,) or (batch, length)).
    Entries where it is false are left out of the statistics and may hold any value. If it is false everywhere, as in a
    batch of padding, the state is not changed, and x is normalized with it.

    Under `jax.jit` the statistics are those of the whole batch on any mesh.

    Args:
        momentum: weight of the old running statistics, in [0, 1).
        eps: added to the variance, in [0, 1).
        scale, bias: whether the layer has each of these parameters.
        axis_name: named axis of a surrounding `jax.vmap` or `jax.shard_map`, over which statistics are averaged too. It
            is not needed while variables are declared or initialized.
        scale_init: initializer of `scale`.

    Raises:
        InputError: x is not floating, or the mask does not fit.

    Ioffe and Szegedy 2015, "Batch Normalization" (arXiv:1502.03167).

    >>> state = {"mean": jnp.array([2.0]), "var": jnp.array([1.0])}
    >>> BatchNorm(eps=0.0, scale=False, bias=False)(state, jnp.array([[1.0], [3.0]]))
    Array([[-1.],
           [ 1.]], dtype=float32)
    """

    momentum: float = 0.9
    eps: float = 1e-5
    scale: bool = True
    bias: bool = True
    axis_name: str | tuple[str, ...] | None = None
    scale_init: Initializer = ones

    def __post_init__(self) -> None:
        check_inputs.within(self, "momentum", 0, 1)
        check_inputs.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("BatchNorm", x))
        check_inputs.at_least("BatchNorm", x, 2, "(batch, ..., features)")
        features = x.shape[-1]
        scale, bias = scale_and_bias(self, v, features)
        mean = v.state("mean", (features,), zeros)
        var = v.state("var", (features,), ones)
        where = None if mask is None else broadcast_leading_mask("BatchNorm", mask, x)
        x = x if where is None else zero_masked_nonfinite(x, where)
        if not v.train or frozen(v) or x.size == 0:
            return batch_norm(x, mean, var, scale, bias, self.eps)
        axis = self._axis(v)
        m, s = moments(x, tuple(range(x.ndim - 1)), where, axis)
        if where is not None:
            some = jnp.sum(where) if axis is None else lax.psum(jnp.sum(where), axis)
            m, s = (jnp.where(some > 0, a, expand_rank(b, a)) for a, b in ((m, mean), (s, var)))
        step = 1 - self.momentum
        v.put(mean=mean + step * (m.reshape(features) - mean), var=var + step * (s.reshape(features) - var))
        return batch_norm(x, m, s, scale, bias, self.eps)

    def _axis(self, v: Vars) -> str | tuple[str, ...] | None:
        """The axis to average over. None if variables are declared or initialized outside of that axis."""
        if self.axis_name is not None and is_declaring(v):
            try:
                lax.axis_size(self.axis_name)
            except NameError:
                return None
        return self.axis_name
