"""Offloading: the optimizer state stays in host memory between steps, and takes no memory of the devices then.

A step copies it to the device and back. Arrays of fewer than `SMALL` elements stay on the device. On a CPU both
memories are the same, so offloading changes only their label.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest

HOST = "pinned_host"
WHAT = ("optimizer",)
SMALL = 2**14
"""Elements below which an array stays on the device: counters and biases cost more to send than to keep."""


def check(what: Any, mesh: Any) -> None:
    """Raise `ConfigError` if ``what`` cannot be offloaded, or not from the devices of this mesh."""
    if what is None:
        return
    if what not in WHAT:
        near = nearest(what, WHAT) if isinstance(what, str) else ""
        raise ConfigError(f"Trainer(offload={what!r}): expected {' or '.join(map(repr, WHAT))}, or None{near}")
    if mesh is None:
        raise ConfigError(f'Trainer(offload={what!r}) needs a mesh, of one device too: mesh="data=-1"')
    if not isinstance(mesh, Mesh):  # an abstract mesh: only the layout is wanted, there are no devices
        return
    device = mesh.devices.flat[0]
    kinds = memories(device)
    if HOST not in kinds:
        has = ", ".join(sorted(kinds)) or "none that it names"
        raise ConfigError(
            f"Trainer(offload={what!r}): {device.device_kind} of the platform {device.platform!r} cannot reach memory "
            f"of the kind {HOST!r} (it has {has}); leave offload out, or split the optimizer's state over the devices: "
            f"rules='zero1' or 'fsdp'"
        )


def memories(device: Any) -> set[str]:
    """Return the kinds of memory that a device can address."""
    try:
        return {memory.kind for memory in device.addressable_memories()}
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):  # a device that is not attached
        return {"device", HOST} if device.platform == "tpu" else set()


def on_host(shardings: Any, shapes: Any) -> Any:
    """Move shardings to host memory, except those of small arrays."""

    def there(sharding: Any, x: Any) -> Any:
        return sharding.with_memory_kind(HOST) if x.size >= SMALL else sharding

    return jax.tree.map(there, shardings, shapes)
