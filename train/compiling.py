"""How programs are compiled: on a CPU with what XLA has no good default for. Elsewhere XLA knows best."""

import functools
import os
from typing import Any

import jax

from sapwood.train import compile_cache, host_memory

OWN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}
"""XLA's defaults but one: it hands convolutions to a library that takes one thread for each, where its own take all.

A training step of ResNet-20 takes 0.77 of the time on two cores, and as long as before on one (jaxlib 0.10.2). A
convolution whose values are summed at once and not used otherwise still goes there, with the sum.
"""


def options(platform: str) -> dict[str, Any]:
    """The ``compiler_options`` of a program for a platform; what ``XLA_FLAGS`` says goes before them.

    >>> options("tpu")
    {}
    """
    return _allowed(OWN_CONVOLUTIONS) if platform == "cpu" else {}


def compiled(traced: Any, platform: str) -> Any:
    """``traced.lower().compile()`` with these options, and on a CPU such that malloc keeps the program's temporaries,
    unless a cache is to keep the program: what takes its memory in pieces cannot be written to disk.

    It is for a program that runs again and again: `fit` compiles its steps so. In a loop of your own:

    >>> import jax, jax.numpy as jnp
    >>> step = jax.jit(lambda x: (x + 1, x.sum()), donate_argnums=0)      # trainer.step
    >>> step = compiled(step.trace(jnp.ones(3)), jax.default_backend())   # trainer.platform
    >>> step(jnp.ones(3))[1].item()
    3.0
    """
    lowered, how = traced.lower(), options(platform)
    if platform == "cpu" and not compile_cache.active():
        pieces = _allowed(host_memory.pieces(traced.jaxpr.jaxpr))
        program = lowered.compile(how | pieces) if pieces else None
        if program is not None and host_memory.keep(program.memory_analysis().temp_size_in_bytes):
            return program
    return lowered.compile(how or None)


def _allowed(options: dict[str, Any]) -> dict[str, Any]:
    """The options that this XLA knows and the user has not set."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags and _known(name, value)}


@functools.cache
def _known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option": XLA drops what was an experiment
        return False
    return True
