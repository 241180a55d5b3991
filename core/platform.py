"""The platform that programs are compiled for, which need not be the one of this machine."""

import contextlib
from typing import Any

import jax

_PLATFORM = jax.make_user_context(None)


def platform() -> str:
    """The platform we compile for: what `compiling_for` says, else that of the default device."""
    if (said := _PLATFORM.value) is not None:
        return said
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(chosen, "platform", chosen) or jax.default_backend()


def compiling_for(name: str) -> contextlib.AbstractContextManager[Any]:
    """Within the block, programs are traced for this platform, whose devices need not be here.

    >>> with compiling_for("tpu"):
    ...     platform()
    'tpu'
    """
    return contextlib.nullcontext() if name == platform() else _PLATFORM(name)  # traces are kept for each name
