"""Two-step gathers for parameters whose gather would span all three dimensions of a TPU torus.

If the devices of a gather differ in all three coordinates, XLA's compiler for TPUs (libtpu 0.0.42, v5p) replaces each
all-gather by an all-reduce over arrays padded with zeros, and each reduce-scatter by an all-reduce: twice the bytes.
No compiler option changes that. Gathers within a plane are not affected. So the mesh axis is split into two, each
within a plane, and a barrier keeps XLA from merging the two gathers.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sapwood.parallel.meshes import AnyMesh


@functools.lru_cache(maxsize=64)
def split_axis(mesh: AnyMesh, axis: str) -> Mesh | None:
    """The same devices with `axis` split into two mesh axes, each within a plane of the chips.

    The second one is called ``{axis}_inside``. The result is None if `axis` is within a plane already, if no split
    helps, if `axis` spans several slices, or if the devices are no TPU chips.

    >>> import sapwood as sw
    >>> split_axis(sw.mesh("fsdp=-1"), "fsdp") is None
    True
    """
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "tpu" or mesh.shape.get(axis, 1) == 1:
        return None
    at, size = mesh.axis_names.index(axis), mesh.shape[axis]
    groups = np.moveaxis(mesh.devices, at, -1).reshape(-1, size)
    if len({getattr(d, "slice_index", None) for d in groups[0]}) > 1 or _dimensions(groups) <= 2:
        return None
    for inner in (n for n in range(2, size) if size % n == 0):
        parts = groups.reshape(-1, size // inner, inner)
        if (
            _dimensions(parts.reshape(-1, inner)) <= 2
            and _dimensions(np.swapaxes(parts, 1, 2).reshape(-1, size // inner)) <= 2
        ):
            sizes = [*mesh.axis_sizes[:at], size // inner, inner, *mesh.axis_sizes[at + 1 :]]
            names = (*mesh.axis_names[: at + 1], f"{axis}_inside", *mesh.axis_names[at + 1 :])
            return Mesh(mesh.devices.reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))
    return None


def _dimensions(groups: np.ndarray) -> int:
    """The largest number of coordinates in which the chips of one group differ."""
    places = np.array([[d.coords for d in group] for group in groups])
    return int((np.ptp(places, axis=1) > 0).sum(-1).max())


def constrain_with_barrier(x: Any, sharding: Any) -> Any:
    """Constrain x to this sharding, with a barrier so that XLA does not merge it with the next sharding."""
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(x, sharding))
