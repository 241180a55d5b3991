"""Batch norm: each channel over all examples and positions; running statistics in eval mode."""

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.initializers import Initializer, ones, zeros
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars, declares, frozen
from sapwood.layers import check_inputs
from sapwood.layers.compute_once import once
from sapwood.layers.expand_rank import aligned
from sapwood.layers.masked_values import contained, leading
from sapwood.layers.norm.statistics import affine, moments, scale_and_bias, standardise, widen


def batch_norm(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` with statistics that are given (`moments` computes them).

    Takes x `(..., features)`; the others broadcast to it, usually `(features,)`. Raises `InputError` for an x that is
    not floating.

    >>> batch_norm(jnp.array([[1.0], [3.0]]), jnp.array([2.0]), jnp.array([1.0]), eps=0.0)
    Array([[-1.],
           [ 1.]], dtype=float32)
    """
    x = check_inputs.floating("batch_norm", x)
    scale = None if scale is None else once(scale)  # and its gradient, which XLA rounds otherwise within an optimizer
    gain = affine(lax.rsqrt(aligned(widen(var), x) + eps), scale, None)
    return standardise(widen(x), aligned(mean, x), gain, 0.0 if bias is None else aligned(bias, x)).astype(x.dtype)


class BatchNorm(Layer):
    """Normalise each channel over the batch and all positions; a running average of the statistics serves later.

    Takes x `(batch, ..., features)` and gives the same shape. When training, it uses the batch's statistics and moves
    the state `mean` and `var` (features,) by `running = momentum * running + (1 - momentum) * batch`; else, and where a
    trainer freezes it (`Trainer(trainable=)`), it uses the state, as in Keras. Parameters: `scale`, `bias` (features,).
    `mask` (boolean, the leading dimensions of x, such as (batch,) or (batch, length)) leaves padding out of the
    statistics, which may hold anything. Where nothing counts, as in a batch that is all padding, the state stays as it
    is and is what x is normalised with.

    Under `jax.jit` the batch is the whole batch on any mesh. Inside `jax.vmap` or `jax.shard_map`, `axis_name` averages
    over that axis; declaring needs shapes alone, and so no axis. The variance is the biased one in both places, as in
    Keras. Raises `InputError` for an x that is not floating or a mask that does not fit.

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

    def __post_init__(self):
        check_inputs.within(self, "momentum", 0, 1)
        check_inputs.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("BatchNorm", x))
        check_inputs.at_least("BatchNorm", x, 2, "(batch, ..., features)")
        features = x.shape[-1]
        scale, bias = scale_and_bias(self, v, features)
        mean = v.state("mean", (features,), zeros)
        var = v.state("var", (features,), ones)
        where = None if mask is None else leading("BatchNorm", mask, x)
        x = x if where is None else contained(x, where)
        if not v.train or frozen(v) or x.size == 0:
            return batch_norm(x, mean, var, scale, bias, self.eps)
        axis = self._axis(v)
        m, s = moments(x, tuple(range(x.ndim - 1)), where, axis)
        if where is not None:
            some = jnp.sum(where) if axis is None else lax.psum(jnp.sum(where), axis)
            m, s = (jnp.where(some > 0, a, aligned(b, a)) for a, b in ((m, mean), (s, var)))
        step = 1 - self.momentum
        v.put(mean=mean + step * (m.reshape(features) - mean), var=var + step * (s.reshape(features) - var))
        return batch_norm(x, m, s, scale, bias, self.eps)

    def _axis(self, v: Vars) -> str | tuple[str, ...] | None:
        """The axis to average over; none where variables are only declared, or first made, outside of it."""
        if self.axis_name is not None and declares(v):
            try:
                lax.axis_size(self.axis_name)
            except NameError:
                return None
        return self.axis_name
