"""How programs are compiled: on a CPU with what XLA has no good default for. Elsewhere XLA knows best."""

from typing import Any

from sapwood.train import compile_cache, host_memory

OWN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}
"""XLA's defaults but one: it hands convolutions to a library that takes one thread for each, where its own take all.

A training step of ResNet-20 takes 0.77 of the time on two cores, and as long as before on one (jaxlib 0.10.2). A
convolution whose values are summed at once and not used otherwise still goes there, with the sum.
"""


def options(platform: str) -> dict[str, Any]:
    """The ``compiler_options`` of a program for a platform.

    >>> options("tpu")
    {}
    """
    return OWN_CONVOLUTIONS if platform == "cpu" else {}


def compiled(traced: Any, platform: str) -> Any:
    """``traced.lower().compile()`` with these options, and on a CPU such that malloc keeps the program's temporaries,
    unless a cache is to keep the program: what takes its memory in pieces cannot be written to disk.

    It is for a program that runs again and again: `fit` compiles its steps so. In a loop of your own:

    >>> import jax, jax.numpy as jnp
    >>> step = jax.jit(lambda x: (x + 1, x.sum()), donate_argnums=0)      # trainer.step
    >>> step = compiled(step.trace(jnp.ones(3)), jax.default_backend())
    >>> step(jnp.ones(3))[1].item()
    3.0
    """
    in_pieces = platform == "cpu" and not compile_cache.active()
    pieces = host_memory.pieces(traced.jaxpr.jaxpr) if in_pieces else {}
    program = traced.lower().compile(options(platform) | pieces)
    if pieces:
        host_memory.keep(program.memory_analysis().temp_size_in_bytes)
    return program
