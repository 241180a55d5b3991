"""Normalisation: batch, layer, RMS and group norm. Statistics are float32 in any policy; results keep x's dtype."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sapwood.core.errors import InputError
from sapwood.core.initializers import Initializer, ones, zeros
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars, declares, frozen
from sapwood.layers import expect
from sapwood.layers.aligned import aligned
from sapwood.layers.contained import contained, leading
from sapwood.layers.once import once


def _wide(x: jax.Array) -> jax.Array:
    """x in float32, or wider if it is."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def moments(
    x: jax.Array, axes: tuple[int, ...], where: jax.Array | None = None, axis_name: str | tuple[str, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of x over `axes`, which are kept with size 1; float32.

    `where` (boolean, broadcasts to x) leaves entries out, `axis_name` averages over a named axis of `jax.vmap` or
    `jax.shard_map` too. The variance is the mean squared distance from the mean: E[x²] - E[x]² takes one pass less and
    loses all digits when the mean is large.

    >>> moments(jnp.array([1e4, 1e4 + 1, 1e4 + 2]), (0,))
    (Array([10001.], dtype=float32), Array([0.6666667], dtype=float32))
    """
    return _moments(_wide(x), where, axes, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _moments(x, where, axes, axis_name):
    mean = _average(x, where, axes, axis_name)
    return mean, _average(jnp.square(x - mean), where, axes, axis_name)


@_moments.defjvp
def _moments_jvp(axes, axis_name, primals, tangents):
    """The variance does not change with the mean that it is taken around: a pass over x less than by the chain rule."""
    (x, where), (dx, _) = primals, tangents
    mean, var = _moments(x, where, axes, axis_name)
    centred = x - mean if where is None else jnp.where(where, x - mean, 0)
    average = functools.partial(_average, where=where, axes=axes, axis_name=axis_name)
    return (mean, var), (average(dx), 2 * average(centred * dx))


def _average(x, where, axes, axis_name):
    if where is None:
        count = math.prod(x.shape[axis] for axis in axes)
    else:
        count = jnp.sum(jnp.broadcast_to(where, x.shape), axes, keepdims=True)
    total = jnp.sum(x, axes, keepdims=True, where=where)
    if axis_name is not None:
        count, total = lax.psum(count, axis_name), lax.psum(total, axis_name)
    return total / (count if where is None else jnp.maximum(count, 1).astype(total.dtype))


@jax.custom_jvp
def _standardise(x, mean, gain, shift):
    return (x - mean) * gain + shift


@_standardise.defjvp
def _standardise_jvp(primals, tangents):
    """What is of the size of the features is gathered first: then the gradient sums over x twice, not three times."""
    (x, mean, gain, _), (dx, dmean, dgain, dshift) = primals, tangents
    return _standardise(*primals), gain * dx + (x - mean) * dgain + (dshift - gain * dmean)


def _affine(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    y = y if scale is None else y * aligned(scale, y)
    return y if bias is None else y + aligned(bias, y)


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
    x = expect.floating("batch_norm", x)
    scale = None if scale is None else once(scale)  # and its gradient, which XLA rounds otherwise within an optimizer
    gain = _affine(lax.rsqrt(aligned(_wide(var), x) + eps), scale, None)
    return _standardise(_wide(x), aligned(mean, x), gain, 0.0 if bias is None else aligned(bias, x)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, eps: float = 1e-5
) -> jax.Array:
    """Normalise the last dimension of each position to mean 0 and variance 1, then `* scale + bias`.

    Takes x `(..., features)`, scale and bias `(features,)`. Raises `InputError` for an x that is not floating.

    >>> layer_norm(jnp.array([1.0, 3.0]), eps=0.0)
    Array([-1.,  1.], dtype=float32)
    """
    x = once(expect.floating("layer_norm", x))
    mean, var = moments(x, (-1,))
    return _affine((_wide(x) - mean) * lax.rsqrt(var + eps), scale, bias).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array | None = None, eps: float = 1e-6) -> jax.Array:
    """Divide the last dimension of each position by its root mean square, then `* scale`.

    Takes x `(..., features)` and scale `(features,)`. Raises `InputError` for an x that is not floating.

    >>> rms_norm(jnp.array([3.0, 3.0]), jnp.array([1.0, 2.0]), eps=0.0)
    Array([1., 2.], dtype=float32)
    """
    x = once(expect.floating("rms_norm", x))
    wide = _wide(x)
    return _affine(wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps), scale, None).astype(x.dtype)


def group_norm(
    x: jax.Array, groups: int, scale: jax.Array | None = None, bias: jax.Array | None = None, eps: float = 1e-5
) -> jax.Array:
    """Normalise each example over all positions and the channels of each of `groups`, then `* scale + bias`.

    Takes x `(batch, ..., channels)`, scale and bias `(channels,)`. Raises `InputError` for channels that do not divide
    into the groups.

    >>> group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    x = expect.floating("group_norm", x)
    expect.at_least("group_norm", x, 2, "(batch, ..., channels)")
    if x.shape[-1] % groups:
        raise InputError(f"group_norm: {x.shape[-1]} channels do not divide into groups={groups}: {describe(x)}")
    grouped = _wide(x).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    mean, var = moments(grouped, (*range(1, x.ndim - 1), x.ndim))
    y = ((grouped - mean) * lax.rsqrt(var + eps)).reshape(x.shape)
    return _affine(y, scale, bias).astype(x.dtype)


def _scale_and_bias(layer: Layer, v: Vars, features: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The two parameters of a norm, as stored, or None where the layer has them switched off."""
    scale = v.param("scale", (features,), layer.scale_init, cast=False) if layer.scale else None  # type: ignore
    bias = v.param("bias", (features,), zeros, cast=False) if getattr(layer, "bias", False) else None
    return scale, bias


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
        expect.within(self, "momentum", 0, 1)
        expect.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = v.policy.cast(expect.floating("BatchNorm", x))
        expect.at_least("BatchNorm", x, 2, "(batch, ..., features)")
        features = x.shape[-1]
        scale, bias = _scale_and_bias(self, v, features)
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


class LayerNorm(Layer):
    """Normalise the features of each position to mean 0 and variance 1: `(..., features)` to the same.

    Parameters: `scale`, `bias` (features,). Raises `InputError` for an x that is not floating.
    Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450).

    >>> LayerNorm(eps=0.0, scale=False)({"bias": jnp.ones(2)}, jnp.array([1.0, 3.0]))
    Array([0., 2.], dtype=float32)
    """

    eps: float = 1e-5
    scale: bool = True
    bias: bool = True
    scale_init: Initializer = ones

    def __post_init__(self):
        expect.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(expect.floating("LayerNorm", x))
        expect.at_least("LayerNorm", x, 1, "(..., features)")
        return layer_norm(x, *_scale_and_bias(self, v, x.shape[-1]), self.eps)


class RMSNorm(Layer):
    """Divide the features of each position by their root mean square: `(..., features)` to the same.

    Parameter: `scale` (features,). Raises `InputError` for an x that is not floating.
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).

    >>> RMSNorm(eps=0.0)({"scale": jnp.ones(2)}, jnp.array([3.0, -3.0]))
    Array([ 1., -1.], dtype=float32)
    """

    eps: float = 1e-6
    scale: bool = True
    scale_init: Initializer = ones

    def __post_init__(self):
        expect.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(expect.floating("RMSNorm", x))
        expect.at_least("RMSNorm", x, 1, "(..., features)")
        return rms_norm(x, _scale_and_bias(self, v, x.shape[-1])[0], self.eps)


class GroupNorm(Layer):
    """Normalise each example over its positions and groups of channels: `(batch, ..., channels)` to the same.

    One group is layer norm over a whole example, as many groups as channels is instance norm. Parameters: `scale`,
    `bias` (channels,). Raises `InputError` for channels that do not divide into the groups.
    Wu and He 2018, "Group Normalization" (arXiv:1803.08494).

    >>> GroupNorm(2, eps=0.0, scale=False, bias=False)({}, jnp.array([[1.0, 3.0, 10.0, 30.0]]))
    Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    groups: int = 32
    eps: float = 1e-5
    scale: bool = True
    bias: bool = True
    scale_init: Initializer = ones

    def __post_init__(self):
        expect.positive(self, "groups")
        expect.within(self, "eps", 0, 1)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(expect.floating("GroupNorm", x))
        expect.at_least("GroupNorm", x, 2, "(batch, ..., channels)")
        return group_norm(x, self.groups, *_scale_and_bias(self, v, x.shape[-1]), self.eps)
