"""Optimizer state in host memory: between steps a device holds none of it.

A step brings it to the device, and sends back what it became. On a CPU both memories are the same, so there it changes
nothing but the label.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest

HOST = "pinned_host"
WHAT = ("optimizer",)
SMALL = 2**14
"""Elements below which an array stays on the device: counters and biases, which cost more to send than to keep."""


def check(what: Any, mesh: Any) -> None:
    """Raise `ConfigError` where this cannot be offloaded, or not from the devices of this mesh."""
    if what is None:
        return
    if what not in WHAT:
        near = nearest(what, WHAT) if isinstance(what, str) else ""
        raise ConfigError(f"Trainer(offload={what!r}): expected {' or '.join(map(repr, WHAT))}, or None{near}")
    if mesh is None:
        raise ConfigError(f'Trainer(offload={what!r}) needs a mesh, of one device too: mesh="data=-1"')
    if not isinstance(mesh, Mesh):  # devices that nobody has yet, whose layout is asked for
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
    """The kinds of memory that a device can address."""
    try:
        return {memory.kind for memory in device.addressable_memories()}
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):  # a device that is not here
        return {"device", HOST} if device.platform == "tpu" else set()


def on_host(shardings: Any, shapes: Any) -> Any:
    """The same shardings in host memory, for all that is not small."""

    def there(sharding: Any, x: Any) -> Any:
        return sharding.with_memory_kind(HOST) if x.size >= SMALL else sharding

    return jax.tree.map(there, shardings, shapes)
