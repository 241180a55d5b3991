"""What runs on each device by itself, for what the compiler cannot split: kernels, rings, all-to-alls."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sapwood.core import platform as compiled_for
from sapwood.parallel.meshes import AnyMesh


def per_device(f: Callable, mesh: AnyMesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the axes of a mesh that no surrounding one has taken yet.

    >>> import jax.numpy as jnp, sapwood as sw
    >>> from jax.sharding import PartitionSpec
    >>> mesh, rows = sw.mesh("data=-1"), PartitionSpec("data")
    >>> f = per_device(lambda x: x.sum(keepdims=True), mesh, rows, rows)
    >>> f(jnp.ones(8 * jax.device_count()))[0]
    Array(8., dtype=float32)
    """
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def alone() -> bool:
    """Whether what is traced runs on each device by itself: inside a `shard_map` over every axis of its mesh.

    >>> alone()
    False
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and all(kind == AxisType.Manual for kind in mesh.axis_types)


def platform(mesh: AnyMesh | None) -> str:
    """The platform of a mesh's devices; that of the default device where none are known.

    >>> import sapwood as sw
    >>> platform(sw.mesh("data=-1")) == jax.default_backend()
    True
    """
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else compiled_for.platform()
