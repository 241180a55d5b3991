"""Normalisation: batch, layer, RMS and group norm. Statistics are float32 in any policy; results keep x's dtype."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sapwood.core.initializers import zeros
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers.expand_rank import aligned


def widen(x: jax.Array) -> jax.Array:
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
    return _moments(widen(x), where, axes, axis_name)


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
def standardise(x, mean, gain, shift):
    return (x - mean) * gain + shift


@standardise.defjvp
def _standardise_jvp(primals, tangents):
    """What is of the size of the features is gathered first: then the gradient sums over x twice, not three times."""
    (x, mean, gain, _), (dx, dmean, dgain, dshift) = primals, tangents
    return standardise(*primals), gain * dx + (x - mean) * dgain + (dshift - gain * dmean)


def affine(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    y = y if scale is None else y * aligned(scale, y)
    return y if bias is None else y + aligned(bias, y)


def scale_and_bias(layer: Layer, v: Vars, features: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The two parameters of a norm, as stored, or None where the layer has them switched off."""
    scale = v.param("scale", (features,), layer.scale_init, cast=False) if layer.scale else None  # type: ignore
    bias = v.param("bias", (features,), zeros, cast=False) if getattr(layer, "bias", False) else None
    return scale, bias
