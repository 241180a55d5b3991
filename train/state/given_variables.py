"""`copy_checked`: checks variables made elsewhere against a model's declarations, and copies them into place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core import messages, paths
from sapwood.core.errors import ConfigError
from sapwood.core.traces import is_traced
from sapwood.saving import array_bits


def copy_checked(what: str, declared: dict, given: Any, shardings: Any = None) -> dict:
    """Copy given arrays, one for each declared `Param`. They are copies because a training step donates its state.

    Args:
        what: name of the arrays, for messages.
        declared: nested dict of `Param`.
        given: nested dict of arrays of NumPy or JAX.
        shardings: nested dict of shardings; None is the default device.

    Returns:
        The nested dict of copies.

    Raises:
        ConfigError: a path is missing or not declared, or an array has another shape or dtype.

    >>> import sapwood as sw
    >>> spec = sw.spec(lambda v, x: x @ v.head.param("w", (3, 1), jax.nn.initializers.zeros), np.ones((2, 3), "f4"))
    >>> copy_checked("params", spec.params, {"head": {"w": np.ones((3, 1), "float32")}})["head"]["w"].shape
    (3, 1)
    """
    if not isinstance(given, dict):
        raise ConfigError(f"{what}: nested dicts of arrays are expected, got {type(given).__name__}")
    declarations = list(paths.leaves(declared))
    here = {paths.join(path): param.struct for path, param in declarations}
    there = {paths.join(path): leaf for path, leaf in paths.leaves(given)}
    for name in there:
        if name not in here:
            raise ConfigError(f"{what} have {name}, which the model has not{messages.nearest(name, here)}")
    missing = [name for name in here if name not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{what} lack {missing[0]}{more} of what the model declares")
    for name, struct in here.items():
        leaf = there[name]
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise ConfigError(f"{what}: {name} is of type {type(leaf).__name__}, an array is expected")
        if (leaf.shape, leaf.dtype) != (struct.shape, struct.dtype):
            came, expected = (
                array_bits.describe_type(str(leaf.dtype), leaf.shape),
                array_bits.describe_type(str(struct.dtype), struct.shape),
            )
            raise ConfigError(f"{what}: {name} is {came}, the model declares {expected}")
    where = {paths.join(path): sharding for path, sharding in paths.leaves(shardings or {})}
    return paths.nest((path, _copy(there[paths.join(path)], where.get(paths.join(path)))) for path, _ in declarations)


def _copy(x: Any, sharding: Any) -> jax.Array:
    """Copy an array to a sharding, or to the default device."""
    if isinstance(x, jax.Array) and sharding is None and not is_traced(x) and x.devices() != {jax.local_devices()[0]}:
        x = np.asarray(x)  # from another device to the default one
    if isinstance(x, np.ndarray):
        return jax.device_put(x, sharding, may_alias=False)
    x = jnp.copy(x)  # copy first: `device_put` to another sharding may reuse a shard, in spite of `may_alias`
    return x if sharding is None else jax.device_put(x, sharding)
