"""The platform that programs are compiled for, such as ``"cpu"`` or ``"tpu"``. It may differ from this machine's.

Traced code that depends on the platform asks `platform()`, not `jax.default_backend()`.
"""

import contextlib
from typing import Any

import jax

_PLATFORM = jax.make_user_context(None)


def platform() -> str:
    """The platform that programs are compiled for: that of `compiling_for`, else that of the default device."""
    if (said := _PLATFORM.value) is not None:
        return said
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(chosen, "platform", chosen) or jax.default_backend()


def compiling_for(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for the platform ``name``. This machine needs no such devices.

    >>> with compiling_for("tpu"):
    ...     platform()
    'tpu'
    """
    # JAX's caches of traces are keyed by the value of this context, so setting it needlessly would trace again.
    return contextlib.nullcontext() if name == platform() else _PLATFORM(name)
