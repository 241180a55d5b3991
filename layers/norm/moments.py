"""Mean, variance and affine step shared by batch, layer, RMS and group norm.

Statistics are float32 (or wider, if x is) in any precision policy; norms return x's dtype. `moments` and `standardise`
have hand-written derivatives, which take fewer passes over x than JAX's own.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sapwood.core.initializers import zeros
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers.expand_rank import expand_rank


def widen(x: jax.Array) -> jax.Array:
    """Convert x to float32, unless it is wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def moments(
    x: jax.Array, axes: tuple[int, ...], where: jax.Array | None = None, axis_name: str | tuple[str, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of x over `axes`, which are kept with size 1; float32, or wider if x is.

    The variance is the mean squared distance from the mean. E[x²] - E[x]² would take one pass less, but loses all
    digits when the mean is large.

    Args:
        x: an array of any shape.
        axes: the dimensions to reduce.
        where: boolean, broadcasts to x; entries where it is false are left out. None counts all.
        axis_name: named axis of `jax.vmap` or `jax.shard_map` to reduce over too.

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
    """d(var)/d(mean) is 0, so the mean's term is dropped; this saves one pass over x."""
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
    """`(x - mean) * gain + shift`, with a gradient that takes two sums over x."""
    return (x - mean) * gain + shift


@standardise.defjvp
def _standardise_jvp(primals, tangents):
    """Terms of the size of the features are added first, so the gradient takes two sums over x instead of three."""
    (x, mean, gain, _), (dx, dmean, dgain, dshift) = primals, tangents
    return standardise(*primals), gain * dx + (x - mean) * dgain + (dshift - gain * dmean)


def affine(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """`y * scale + bias`; None leaves one out."""
    y = y if scale is None else y * expand_rank(scale, y)
    return y if bias is None else y + expand_rank(bias, y)


def scale_and_bias(layer: Layer, v: Vars, features: int) -> tuple[jax.Array | None, jax.Array | None]:
    """The parameters `scale` and `bias` of a norm, in their stored dtype. None for one that the layer switches off."""
    scale = v.param("scale", (features,), layer.scale_init, cast=False) if layer.scale else None  # type: ignore
    bias = v.param("bias", (features,), zeros, cast=False) if getattr(layer, "bias", False) else None
    return scale, bias
