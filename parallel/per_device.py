"""Functions that run on each device by itself (`jax.shard_map`), for code that the compiler cannot split.

Such code is kernels, rings and all-to-alls. Inside a `shard_map`, the mesh axes it covers have the type Manual.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sapwood.core import target_platform
from sapwood.parallel.meshes import AnyMesh


def per_device(f: Callable, mesh: AnyMesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` of `f` over the mesh axes that no surrounding `shard_map` covers.

    Args:
        f: a function of arrays, which gets and returns one device's parts.
        mesh: the mesh; axes with type Manual belong to a surrounding `shard_map`.
        in_specs: a pytree of `PartitionSpec` for the arguments.
        out_specs: a pytree of `PartitionSpec` for the results.

    >>> import jax.numpy as jnp, sapwood as sw
    >>> from jax.sharding import PartitionSpec
    >>> mesh, rows = sw.mesh("data=-1"), PartitionSpec("data")
    >>> f = per_device(lambda x: x.sum(keepdims=True), mesh, rows, rows)
    >>> f(jnp.ones(8 * jax.device_count()))[0]
    Array(8., dtype=float32)
    """
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def is_on_one_device() -> bool:
    """True inside a `shard_map` over every axis of its mesh: the traced code runs on each device by itself.

    >>> is_on_one_device()
    False
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and all(kind == AxisType.Manual for kind in mesh.axis_types)


def platform(mesh: AnyMesh | None) -> str:
    """The platform of a mesh's devices, such as "tpu".

    For None and for an `AbstractMesh`, it is the platform that programs are compiled for (`core.platform`).

    >>> import sapwood as sw
    >>> platform(sw.mesh("data=-1")) == jax.default_backend()
    True
    """
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else target_platform.platform()
