"""Encode arrays of any dtype for file formats that know only the plain dtypes.

Orbax's array driver and safetensors both hold the plain dtypes. Other dtypes are stored as unsigned integers, under the
name of the real dtype: PRNG keys as the words of their data, 8-bit floats and all 4-bit and 2-bit dtypes as bytes.
complex128 is stored as float64 with a last dimension of size 2.
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


def describe_type(dtype: str, shape: Any) -> str:
    """Dtype and shape as messages show them.

    >>> describe_type("float32", (3, 4))
    'float32[3,4]'
    """
    return f"{dtype}[{','.join(map(str, shape))}]"


def as_array(name: str, leaf: Any) -> jax.Array:
    """Convert a leaf to a `jax.Array` of the same dtype.

    Raises ConfigError, which names the leaf, if it is not an array or if JAX would change its dtype.
    """
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


def struct_of(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, a `Param` or a `jax.ShapeDtypeStruct`.

    A leaf without sharding gets the default device. Raises ConfigError, which names the leaf, if its sharding does not
    divide its shape.
    """
    if isinstance(leaf, Param):
        leaf = leaf.struct
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = as_array(name, leaf)
    sharding = leaf.sharding or _default_sharding()
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        what = f"{name} is {describe_type(str(leaf.dtype), leaf.shape)}"
        raise ConfigError(f"{what} and its sharding does not divide it: {error}; choose another one") from error
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def struct(dtype: str, shape: Any) -> jax.ShapeDtypeStruct:
    """The `jax.ShapeDtypeStruct` of an array that `digest.describe` described, on the default device.

    Raises CheckpointError if JAX needs `jax_enable_x64` for the dtype and it is off.

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
    """Encode an array in a dtype that the file formats can hold.

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
    """The inverse of `encode`: the array in the dtype of `real`.

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
    """Shape and dtype that `encode` gives an array like `real`, with the same sharding.

    A last dimension that `encode` adds is not sharded.
    """
    stored = jax.eval_shape(encode, jax.ShapeDtypeStruct(real.shape, real.dtype))
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=real.sharding)


def empty(real: jax.ShapeDtypeStruct) -> jax.Array:
    """The encoded form of an array without elements. Orbax does not store such arrays, so they are made here."""
    stored = stored_struct(real)
    return jnp.zeros(stored.shape, stored.dtype, device=stored.sharding)
