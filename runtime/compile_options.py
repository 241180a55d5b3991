"""How programs are compiled: on a CPU with what XLA has no good default for. Elsewhere XLA knows best."""

import functools
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from sapwood.core.errors import ConfigError
from sapwood.runtime import compile_cache, malloc

OWN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}
"""XLA's defaults but one: it hands convolutions to a library that takes one thread for each, where its own take all.

A training step of ResNet-20 takes 0.77 of the time on two cores, and as long as before on one (jaxlib 0.10.2). A
convolution whose values are summed at once and not used otherwise still goes there, with the sum.
"""

LESS_OF_LLVM = {"xla_backend_optimization_level": 1}
"""Compiling takes 0.8 of the time (jaxlib 0.10.2), and a step as long as before, for XLA itself vectorises.

At level 0 a step takes twice as long, which pays only for what runs once (`core.init.quick`).
"""

AFTER = 20.0
"""Seconds a run has to last before anything is compiled anew for what is left of it."""


def options(platform: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``compiler_options`` of a program for a platform; ``XLA_FLAGS`` go before them, ``own`` before all.

    >>> options("tpu"), options("tpu", {"xla_tpu_enable_async_all_to_all": True})
    ({}, {'xla_tpu_enable_async_all_to_all': True})
    """
    return (_allowed(OWN_CONVOLUTIONS | LESS_OF_LLVM) if platform == "cpu" else {}) | dict(own or {})


def check(own: Any) -> dict[str, Any]:
    """`Trainer(compiler_options=)` as a dict of its own; a `ConfigError` for what is none. XLA knows which exist."""
    if own is None:
        return {}
    if not isinstance(own, Mapping) or not all(isinstance(name, str) for name in own):
        raise ConfigError(
            f"Trainer(compiler_options={own!r}): a dict of XLA's options is expected, such as "
            "{'xla_tpu_scoped_vmem_limit_kib': 65536}"
        )
    if dashes := [name for name in own if name.startswith("-")]:
        raise ConfigError(
            f"Trainer(compiler_options=...): without dashes: {dashes[0].lstrip('-')!r}, not {dashes[0]!r}"
        )
    wrong = {name: value for name, value in own.items() if not isinstance(value, bool | int | float | str)}
    if wrong:
        raise ConfigError(f"Trainer(compiler_options={wrong!r}): a value is a number, True, False or a string")
    return dict(own)


def compiled(traced: Any, platform: str, own: Mapping[str, Any] | None = None) -> Any:
    """``traced.lower().compile()`` with these options, and on a CPU such that malloc keeps the program's temporaries,
    where `host_memory` lets it. Where a cache keeps programs that is so for large ones after `AFTER` seconds only, and
    on several processes not at all.

    It is for a program that runs again and again: `fit` compiles its steps so. In a loop of your own:

    >>> import jax, jax.numpy as jnp
    >>> step = jax.jit(lambda x: (x + 1, x.sum()), donate_argnums=0)      # trainer.step
    >>> step = compiled(step.trace(jnp.ones(3)), jax.default_backend())   # trainer.platform
    >>> step(jnp.ones(3))[1].item()
    3.0
    """
    lowered = traced.lower()
    in_pieces = functools.partial(_in_pieces, lowered, traced.jaxpr.jaxpr, own)
    how = options(platform, own) or None
    if platform != "cpu":
        return lowered.compile(how)
    if not compile_cache.active():
        return in_pieces() or lowered.compile(how)
    program = lowered.compile(how)
    temporaries = program.memory_analysis().temp_size_in_bytes
    if temporaries <= malloc.LARGEST:
        malloc.keep(temporaries)
    elif jax.process_count() == 1 and malloc.fits(temporaries):
        return Relay(program, in_pieces)
    return program


def _in_pieces(lowered: Any, jaxpr: Any, own: Mapping[str, Any] | None) -> Any:
    """The program compiled such that it takes its memory in pieces; None where malloc would not keep them."""
    pieces = _allowed(malloc.pieces(jaxpr))
    if not pieces:
        return None
    program = lowered.compile(pieces | options("cpu", own))
    return program if malloc.keep(program.memory_analysis().temp_size_in_bytes) else None


class Relay:
    """A program that a cache keeps, which hands over to one that takes its memory in pieces: the same bits, faster.

    XLA cannot write the second one to disk. So the first one runs, at once where the cache has it, and a run that lasts
    longer than `AFTER` compiles the second one in a thread, as ``successor()``, and goes on with it.
    """

    def __init__(self, program: Any, successor: Callable[[], Any]):
        self.program = program
        self.successor: Callable[[], Any] | None = successor
        self.begun: float | None = None
        self.made: Future | None = None

    def __call__(self, *args: Any) -> Any:
        if self.successor is not None:
            self._look(time.monotonic())
        return self.program(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def _look(self, now: float) -> None:
        self.begun = self.begun or now
        if self.made is None and now - self.begun >= AFTER:
            pool = ThreadPoolExecutor(1, thread_name_prefix="sapwood-relay")
            self.made = pool.submit(_beside, self.successor)
            pool.shutdown(wait=False)
        elif self.made is not None and self.made.done():
            made = None if self.made.exception() else self.made.result()
            self.program, self.successor = made or self.program, None


def _beside(make: Any) -> Any:
    with compile_cache.unwritten():
        return make()


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
