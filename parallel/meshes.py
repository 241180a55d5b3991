"""Device meshes: ``mesh("data=4,fsdp=2")`` makes the grid of devices over which all arrays are sharded.

The names and the order of the axes are fixed (`AXES`), so that axes with much traffic get fast links: see `_laid_out`
for the placement on TPU chips and slices. All axes are `AxisType.Auto`. `abstract` makes a mesh of devices that do not
exist, and `with_auto_axes` turns a user's Explicit mesh into an Auto one.
"""

import math
import numbers
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest

AnyMesh = Mesh | AbstractMesh

# The order is from the slowest link to the fastest: the last axis runs over neighbouring devices. Every mesh has this
# order, so "fsdp=2,data=4" and "data=4,fsdp=2" are the same mesh, and tensor parallelism gets the best links.
AXES: dict[str, str] = {
    "replica": "data parallelism across slices or pods",
    "data": "data parallelism: each device holds all parameters",
    "stage": "pipeline stages",
    "fsdp": "data parallelism with parameters and optimizer state sharded",
    "expert": "experts of a mixture",
    "sequence": "the length of a sequence (context parallelism)",
    "tensor": "heads, hidden units and vocabulary",
}

SLOW_NETWORK_AXES = ("replica", "data", "stage")
"""The axes that may cross the slow network between slices, in this order of preference.

They send least: gradients, or activations between stages.
"""

HELP = 'write axis=size pairs such as "data=4,fsdp=2"; one size may be -1 for all remaining devices'


class MeshWarning(UserWarning):
    """A mesh works, but its axes do not suit its devices."""


def mesh(text: str | None = None, *, devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """Make a mesh of devices, from a string or from keywords.

    The axis names are those of `AXES`. For other axes, build a `jax.sharding.Mesh` and give `Rules` that name them. All
    axes have type `AxisType.Auto`: the compiler propagates shardings, and constraints are requests. (`jax.make_mesh`
    makes Explicit axes, where every operation must name its output sharding.)

    Any sizes that multiply to the number of devices work. On a TPU the axes follow the links between the chips, and the
    last axis gets the closest chips; an axis that fits no whole physical axis gets a part of one. If the devices belong
    to several slices, the axes replica, data and stage, in this order, cross the slow network between the slices. A
    `MeshWarning` says if another axis has to cross it.

    Args:
        text: pairs axis=size such as "data=4,fsdp=2". One size may be -1, for all remaining devices. Without `text` and
            `sizes` the mesh is "data=-1".
        devices: the devices, as a list or an array; None is all of `jax.devices()`.
        **sizes: the sizes as keywords, in place of `text`.

    >>> import jax, sapwood.parallel as parallel
    >>> m = parallel.mesh("data=-1,fsdp=1")
    >>> m.axis_names, m.shape["data"] == len(jax.devices())
    (('data', 'fsdp'), True)
    >>> m == parallel.mesh(fsdp=1, data=-1)
    True

    Raises:
        ConfigError: the string cannot be read; an axis is unknown or given twice; more than one size is -1; the sizes
            do not multiply to the number of devices; a device is given twice; or slices differ in their number of
            devices.
    """
    if text is not None and sizes:
        raise ConfigError(f"mesh: give a string or keywords, not both; got {text!r} and {sizes}")
    pairs = _read(text) if text is not None else list(sizes.items()) or [("data", -1)]
    devices = jax.devices() if devices is None else _listed(devices)
    return _laid_out(_fill(_check(pairs), len(devices)), devices)


def abstract(text: str, devices: int | None = None) -> AbstractMesh:
    """A mesh like ``mesh(text)`` whose devices need not exist.

    `devices` is the number of devices; None is the product of the sizes.

    >>> abstract("fsdp=64,tensor=8").size, abstract("fsdp=-1,tensor=8", 512).shape["fsdp"]
    (512, 64)

    Raises:
        ConfigError: as for `mesh`; or a size is -1 and `devices` is None.
    """
    shape = _check(_read(text))
    if devices is None and -1 in shape.values():
        raise ConfigError(f"mesh {text!r}: -1 stands for all remaining devices; say how many devices there are")
    if devices is not None and devices < 1:
        raise ConfigError(f"mesh {text!r}: {devices} devices make no mesh; give at least one")
    sizes = _fill(shape, math.prod(shape.values()) if devices is None else devices)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _listed(devices: Any) -> list[Any]:
    """The devices as a list, from a list, an array of any shape, or one device.

    A `ConfigError` if there are none, if one is no device, or if one occurs twice.
    """
    found = list(devices.flat) if isinstance(devices, np.ndarray) else devices
    found = list(found) if isinstance(found, Iterable) else [found]
    if not found:
        raise ConfigError("mesh: devices is empty; leave it out to use all of jax.devices()")
    if not all(hasattr(device, "device_kind") for device in found):
        raise ConfigError(f"mesh: devices={devices!r} are no devices; give a list such as jax.devices()[:4]")
    twice = [device for device, times in Counter(found).items() if times > 1]
    if twice:
        raise ConfigError(f"mesh: devices has {twice[0]} more than once; give each device once")
    return found


def _read(text: str) -> list[tuple[str, int]]:
    """Read ``"data=4, fsdp=-1"`` into pairs (axis, size), in the order written."""
    if not isinstance(text, str):
        raise ConfigError(f"mesh: expected a string, got {text!r}; {HELP}, or give keywords: data=4, fsdp=2")
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z_]+)\s*=\s*(-1|[0-9]+)\s*", part, re.ASCII)
        if not match:
            raise ConfigError(f"mesh {text!r}: cannot read {part.strip()!r}; {HELP}")
        pairs.append((match[1], int(match[2])))
    return pairs


def _check(pairs: list[tuple[str, int]]) -> dict[str, int]:
    """The pairs as a dict in the order of `AXES`; a `ConfigError` if a name or a size is wrong."""
    written = ",".join(f"{name}={size}" for name, size in pairs)
    for i, (name, size) in enumerate(pairs):
        if name not in AXES:
            raise ConfigError(
                f"mesh {written!r}: unknown axis {name!r}{nearest(name, AXES)} (axes: {', '.join(AXES)}). "
                "For axes of your own, build a jax.sharding.Mesh and name them in Rules"
            )
        if name in dict(pairs[:i]):
            raise ConfigError(f"mesh {written!r}: axis {name!r} is given twice")
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or (size < 1 and size != -1):
            raise ConfigError(f"mesh {written!r}: {name}={size!r} is no size; use a positive integer, or -1")
    if sum(size == -1 for _, size in pairs) > 1:
        raise ConfigError(f"mesh {written!r}: only one axis may be -1")
    sizes = {name: int(size) for name, size in pairs}  # sizes may be NumPy integers
    return {name: sizes[name] for name in AXES if name in sizes}


def _fill(shape: dict[str, int], count: int) -> dict[str, int]:
    """`shape` with its -1 replaced, checked against the number of devices."""
    written = ",".join(f"{name}={size}" for name, size in shape.items())
    known = math.prod(size for size in shape.values() if size != -1)
    free = [name for name, size in shape.items() if size == -1]
    if free and count % known:
        raise ConfigError(
            f"mesh {written!r}: the number of devices, {count}, does not divide by {known}, so no size for "
            f"{free[0]!r} fits; change the other sizes"
        )
    if not free and known != count:
        raise ConfigError(
            f"mesh {written!r}: the sizes multiply to {known}, the number of devices is {count}; write -1 "
            f"for one axis to take all of them, or give devices=jax.devices()[:n] to use n. (On a CPU, "
            f"`sapwood ... --devices {known}` or XLA_FLAGS=--xla_force_host_platform_device_count={known} simulates "
            f"{known}.)"
        )
    return {name: count // known if size == -1 else size for name, size in shape.items()}


def _laid_out(shape: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """Make the mesh so that its axes follow the links between these devices.

    Inside a slice, the axes that need the most bandwidth get whole physical axes if these fit, else parts of them. With
    several slices, the axes that send least cross the slow network: replica, then data, then stage.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    sizes, across = tuple(shape.values()), _across(shape, slices)
    inside = tuple(size // n for size, n in zip(sizes, across, strict=True))
    blocks = np.stack([_in_a_slice(inside, slices[index]) for index in sorted(slices)]).reshape(*across, *inside)
    order = [dim for axis in range(len(shape)) for dim in (axis, len(shape) + axis)]  # an axis: slices, then inside
    grid = blocks.transpose(order).reshape(sizes)
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _in_a_slice(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice as an array of these sizes."""
    from jax.experimental import mesh_utils

    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except AssertionError:  # the devices form no box of chips, or a chip has several devices: any order works
        return np.array(devices, object).reshape(sizes)


def _across(shape: dict[str, int], slices: dict[int, list[Any]]) -> tuple[int, ...]:
    """The number of slices that each axis spans; a `MeshWarning` if one not in `SLOW_NETWORK_AXES` spans several."""
    written = ",".join(f"{name}={size}" for name, size in shape.items())
    counts = sorted({len(devices) for devices in slices.values()})
    if len(counts) > 1:
        raise ConfigError(
            f"mesh {written!r}: the devices are of {len(slices)} slices, {' and '.join(map(str, counts))} of each; a "
            "mesh takes as many devices of one slice as of another: choose them with devices="
        )
    across, left = dict.fromkeys(shape, 1), len(slices)
    for name in sorted(shape, key=(*SLOW_NETWORK_AXES, *AXES).index):
        across[name] = math.gcd(shape[name], left)
        left //= across[name]
    slow = {name: n for name, n in across.items() if n > 1 and name not in SLOW_NETWORK_AXES}
    if slow:
        better = {name: size // slow.get(name, 1) for name, size in shape.items()}
        better["replica"] = better.get("replica", 1) * math.prod(slow.values())
        fits = ",".join(f"{name}={better[name]}" for name in AXES if better.get(name, 1) > 1)
        warnings.warn(
            f"mesh {written!r}: these devices are {len(slices)} slices joined by a slow network, and the axis "
            f"{' and '.join(map(repr, slow))} crosses it with every layer; {fits!r} sends gradients alone over it",
            MeshWarning,
            stacklevel=4,
        )
    return tuple(across.values())


def with_auto_axes(mesh: AnyMesh) -> AnyMesh:
    """The same mesh with every axis `AxisType.Auto`, so that a user's Explicit mesh works too.

    Under ``jax.set_mesh`` with an Explicit mesh, every operation would have to name its output sharding. Models do not,
    so such a context is an error.

    Raises:
        ConfigError: `mesh` is no mesh, or an Explicit mesh is set in the context.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ConfigError(f"mesh: expected a jax.sharding.Mesh, got {mesh!r}; sapwood.mesh(...) makes one")
    context = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in context.axis_types:
        raise ConfigError(
            f"jax.set_mesh has set a mesh with Explicit axes {context.axis_names}, where every operation "
            "must name its output sharding; give it as mesh= instead, or set one made by sapwood.mesh(...)"
        )
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
