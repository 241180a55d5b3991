"""Initializers: `init(key, shape, dtype) -> array`, as in `jax.nn.initializers`, but values that can be compared.

The functions of `jax.nn.initializers` are closures, so `normal(0.02) != normal(0.02)`. Here each one is a frozen
dataclass: it is equal if its numbers are equal, it is hashable, and it prints as its constructor call. So two
declarations of one parameter can agree, layers compare by value, and equal parameters are drawn in one vectorized call.
Any function of the same signature also serves as an initializer.

Dtypes narrower than float32 are drawn in float32 and rounded. A parameter stored in bfloat16 is then the rounded
float32 one, and its tails are not those of an 8-bit uniform.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.nn import initializers as jax_initializers

from sapwood.core.errors import DeclarationError

Shape = tuple[int, ...]
Axes = int | tuple[int, ...]
Initializer = Callable[[jax.Array, Shape, Any], jax.Array]
"""`init(key, shape, dtype) -> array`; the functions of `jax.nn.initializers` also have this type."""


FLAT_BELOW = 2**20
"""Draws of fewer elements than this are made in one dimension and reshaped. The numbers are the same, and compiling
takes a third of the time (XLA's counter for a draw in four dimensions is long). Larger draws keep their shape, so that
they can be sharded."""


def _draw(init: Callable, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
    """Call `init` in float32 if `dtype` is narrower, then round. It gets a flat shape for small draws.

    So `init` must treat all elements alike.
    """
    flat = (math.prod(shape),) if math.prod(shape) < FLAT_BELOW else shape
    return init(key, flat, _wide(dtype)).reshape(shape).astype(dtype)


def _wide(dtype: Any) -> Any:
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def _hashable(value: Any) -> Any:
    """Convert arrays and lists to nested tuples, which compare and hash by value; numbers stay numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class constant:
    """One number in every element, or an array (held as nested tuples) broadcast to the parameter's shape.

    >>> constant(0.5)(jax.random.key(0), (2,), jnp.float32)
    Array([0.5, 0.5], dtype=float32)
    """

    value: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _hashable(self.value))

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.value, dtype), shape)


zeros = constant(0)
ones = constant(1)


@dataclass(frozen=True)
class normal:
    """A normal distribution around 0.

    >>> normal(0.02) == normal(0.02)
    True
    """

    stddev: float

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        return _draw(jax_initializers.normal(self.stddev), key, shape, dtype)


@dataclass(frozen=True)
class truncated_normal:
    """A normal distribution around 0, cut at two `stddev`. Cut, it has a standard deviation of 0.88 `stddev`.

    >>> truncated_normal(0.02)(jax.random.key(0), (3, 4), jnp.bfloat16).dtype
    dtype(bfloat16)
    """

    stddev: float

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        return _draw(jax_initializers.truncated_normal(self.stddev), key, shape, dtype)


@dataclass(frozen=True)
class uniform:
    """A uniform distribution on [low, high).

    >>> uniform(-0.1, 0.1)
    uniform(low=-0.1, high=0.1)
    """

    low: float
    high: float

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        return _draw(lambda k, s, d: jax.random.uniform(k, s, d, self.low, self.high), key, shape, dtype)


_STDDEV_CUT_AT_2 = 0.87962566103423978  # of a standard normal distribution cut at plus and minus 2


@dataclass(frozen=True)
class variance_scaling:
    """Mean 0 and variance `scale / fan`, so that signals neither grow nor fade from layer to layer.

    Special cases with names: `lecun_*` (LeCun et al. 1998, "Efficient BackProp"), `glorot_*` (Glorot and Bengio 2010),
    `he_*` (He et al. 2015, arXiv:1502.01852).

    Args:
        scale: the numerator of the variance.
        mode: the fan: the number of inputs of one output (`"fan_in"`), of outputs of one input (`"fan_out"`), or their
            mean (`"fan_avg"`).
        distribution: `"truncated_normal"`, `"normal"` or `"uniform"`.
        in_axis: the dimensions of the inputs.
        out_axis: the dimensions of the outputs. All other dimensions are a convolution's window and count in both fans.

    Raises:
        DeclarationError: when called with a shape that lacks one of these dimensions.

    >>> variance_scaling(1.0, "fan_in", "truncated_normal") == lecun_normal()
    True
    """

    scale: float
    mode: Literal["fan_in", "fan_out", "fan_avg"]
    distribution: Literal["truncated_normal", "normal", "uniform"]
    in_axis: Axes = -2
    out_axis: Axes = -1

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        stddev = math.sqrt(self.scale / max(1.0, self._fan(shape)))
        if self.distribution == "truncated_normal":
            init = jax_initializers.truncated_normal(stddev / _STDDEV_CUT_AT_2)
        elif self.distribution == "normal":
            init = jax_initializers.normal(stddev)
        else:
            high = math.sqrt(3.0) * stddev
            init = uniform(-high, high)
        return _draw(init, key, shape, dtype)

    def _fan(self, shape: Shape) -> float:
        axes = [(axis,) if isinstance(axis, int) else axis for axis in (self.in_axis, self.out_axis)]
        if not all(-len(shape) <= i < len(shape) for axis in axes for i in axis):
            raise DeclarationError(
                f"{self!r} needs a shape with the dimensions in_axis and out_axis, got {shape}; a vector starts from "
                "zeros, ones, normal(stddev) or uniform(low, high)"
            )
        inputs, outputs = (math.prod(shape[i] for i in axis) for axis in axes)
        window = math.prod(shape) / max(1, inputs * outputs)
        fans = {"fan_in": inputs, "fan_out": outputs, "fan_avg": (inputs + outputs) / 2}
        return fans[self.mode] * window


def lecun_normal(in_axis: Axes = -2, out_axis: Axes = -1) -> variance_scaling:
    """Variance 1 / fan_in, truncated normal: the default of dense and convolution kernels."""
    return variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis)


def lecun_uniform(in_axis: Axes = -2, out_axis: Axes = -1) -> variance_scaling:
    """Variance 1 / fan_in, uniform."""
    return variance_scaling(1.0, "fan_in", "uniform", in_axis, out_axis)


def glorot_normal(in_axis: Axes = -2, out_axis: Axes = -1) -> variance_scaling:
    """Variance 2 / (fan_in + fan_out), truncated normal; also known as Xavier."""
    return variance_scaling(1.0, "fan_avg", "truncated_normal", in_axis, out_axis)


def glorot_uniform(in_axis: Axes = -2, out_axis: Axes = -1) -> variance_scaling:
    """Variance 2 / (fan_in + fan_out), uniform; Keras's default."""
    return variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis)


def he_normal(in_axis: Axes = -2, out_axis: Axes = -1) -> variance_scaling:
    """Variance 2 / fan_in, truncated normal: for layers that a ReLU follows; also known as Kaiming."""
    return variance_scaling(2.0, "fan_in", "truncated_normal", in_axis, out_axis)


def he_uniform(in_axis: Axes = -2, out_axis: Axes = -1) -> variance_scaling:
    """Variance 2 / fan_in, uniform."""
    return variance_scaling(2.0, "fan_in", "uniform", in_axis, out_axis)


@dataclass(frozen=True)
class orthogonal:
    """`scale` times a matrix with orthonormal rows or columns, whichever are fewer; the last dimension is the columns.

    Saxe et al. 2014, "Exact solutions to the nonlinear dynamics of learning" (arXiv:1312.6120).

    >>> q = orthogonal()(jax.random.key(0), (5, 3), jnp.float32)
    >>> bool(jnp.allclose(q.T @ q, jnp.eye(3), atol=1e-5))
    True
    """

    scale: float = 1.0

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        return jax_initializers.orthogonal(self.scale)(key, shape, _wide(dtype)).astype(dtype)
