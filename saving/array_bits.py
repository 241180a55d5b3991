"""How arrays of any dtype are put into formats that know fewer: as their bits.

Orbax's array driver and safetensors both hold the plain dtypes. What they lack is stored as unsigned integers under the
name of its real dtype: PRNG keys as the words of their data, floats of 8 bits and all of 4 or 2 bits in bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.param import Param

_PLAIN = {"bool", "bfloat16", "float16", "float32", "float64", "complex64"}
_PLAIN |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def kind(dtype: str, shape: Any) -> str:
    """`float32[3,4]`, as messages show it.

    >>> kind("float32", (3, 4))
    'float32[3,4]'
    """
    return f"{dtype}[{','.join(map(str, shape))}]"


def as_array(name: str, leaf: Any) -> jax.Array:
    """A leaf as a `jax.Array` of the same dtype. ConfigError, naming it, where it is no array or would change."""
    if isinstance(leaf, jax.Array):
        return leaf
    if not isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex)):
        raise ConfigError(f"{name} is of type {type(leaf).__name__}; only arrays can be stored here")
    array = jnp.asarray(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)) and array.dtype != leaf.dtype:
        raise ConfigError(
            f"{name} is {leaf.dtype}, which JAX would make {array.dtype}; convert it, or enable jax_enable_x64"
        )
    return array


def as_struct(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding (else the default device) of an array, a `Param` or a `jax.ShapeDtypeStruct`.

    ConfigError, naming it, where its sharding does not divide its shape.
    """
    if isinstance(leaf, Param):
        leaf = leaf.struct
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = as_array(name, leaf)
    sharding = leaf.sharding or _default_sharding()
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        what = f"{name} is {kind(str(leaf.dtype), leaf.shape)}"
        raise ConfigError(f"{what} and its sharding does not divide it: {error}; choose another one") from error
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def struct(dtype: str, shape: Any) -> jax.ShapeDtypeStruct:
    """The array that `describe` described, on the default device.

    >>> struct("key<fry>", [3]).dtype
    key<fry>
    """
    if dtype in _KEYS:
        real = jax.eval_shape(lambda: jax.random.key(0, impl=_KEYS[dtype])).dtype
    else:
        real = jnp.dtype(dtype)
        if jax.dtypes.canonicalize_dtype(real) != real:
            raise CheckpointError(f"there are {dtype} arrays in it; enable jax_enable_x64 to read them")
    return jax.ShapeDtypeStruct(tuple(shape), real, sharding=_default_sharding())


def _default_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def encode(x: jax.Array) -> jax.Array:
    """The array in a dtype that can be stored.

    >>> encode(jnp.array([1, -1], "int4"))
    Array([ 1, 15], dtype=uint8)
    """
    if _is_key(x.dtype):
        return jax.random.key_data(x)
    if str(x.dtype) in _PLAIN:
        return x
    if x.dtype == jnp.complex128:
        return jnp.stack([x.real, x.imag], -1)
    return jax.lax.bitcast_convert_type(x, f"uint{jax.dtypes.itemsize_bits(x.dtype)}").astype(jnp.uint8)


def decode(x: jax.Array, real: jax.ShapeDtypeStruct) -> jax.Array:
    """The inverse of `encode`, for an array of `real`'s dtype.

    >>> decode(jnp.array([1, 15], "uint8"), jax.ShapeDtypeStruct((2,), "int4"))
    Array([1, -1], dtype=int4)
    """
    if _is_key(real.dtype):
        return jax.random.wrap_key_data(x, impl=_KEYS[str(real.dtype)])
    if str(real.dtype) in _PLAIN:
        return x
    if real.dtype == jnp.complex128:
        return jax.lax.complex(x[..., 0], x[..., 1])
    return jax.lax.bitcast_convert_type(x.astype(f"uint{jax.dtypes.itemsize_bits(real.dtype)}"), real.dtype)


def stored_struct(real: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What `encode` makes of such an array, under the same sharding (a last dimension it adds is not split)."""
    stored = jax.eval_shape(encode, jax.ShapeDtypeStruct(real.shape, real.dtype))
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=real.sharding)


def empty(real: jax.ShapeDtypeStruct) -> jax.Array:
    """The stored form of an array without elements, which Orbax does not store."""
    stored = stored_struct(real)
    return jnp.zeros(stored.shape, stored.dtype, device=stored.sharding)
