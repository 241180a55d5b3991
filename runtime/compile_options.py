"""Compiler options for programs, and how training steps are compiled.

On a CPU, a few of XLA's defaults are slow; the options here replace them. On other platforms there are no options but
the user's. `compiled` also makes a step on a CPU keep its memory between runs (see `runtime.malloc`).
"""

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
"""XLA's default without one item: convolutions go to XLA's own code, not to a library.

The library uses one thread for each convolution, XLA's own code uses all threads. A training step of ResNet-20 takes
0.77 of the time on two cores, and the same time on one (jaxlib 0.10.2). A convolution whose values are summed at once,
and not used otherwise, still goes to the library together with the sum.
"""

LESS_OF_LLVM = {"xla_backend_optimization_level": 1}
"""Less optimization by LLVM. Compiling takes 0.8 of the time (jaxlib 0.10.2).

A step takes the same time as before, because XLA itself vectorizes. At level 0 a step takes twice as long, which pays
only for programs that run once (`core.init.run_once_options`).
"""

AFTER = 20.0
"""Seconds that a run lasts before `UpgradingProgram` compiles a faster program for the rest of it."""


def options(platform: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``compiler_options`` for programs on a platform such as "cpu".

    ``own`` are the user's options, which override all others. The variable ``XLA_FLAGS`` overrides Sapwood's options.

    >>> options("tpu"), options("tpu", {"xla_tpu_enable_async_all_to_all": True})
    ({}, {'xla_tpu_enable_async_all_to_all': True})
    """
    return (_allowed(OWN_CONVOLUTIONS | LESS_OF_LLVM) if platform == "cpu" else {}) | dict(own or {})


def check(own: Any) -> dict[str, Any]:
    """Check `Trainer(compiler_options=)`, and return a copy as a dict. XLA itself checks which options exist.

    Raises:
        ConfigError: it is no mapping from names to numbers, booleans or strings, or a name starts with a dash.
    """
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
    """``traced.lower().compile()`` with the options of `options`, for a program that runs many times.

    On a CPU, it also makes malloc keep the program's temporaries between runs, if `runtime.malloc` allows that. If a
    compile cache is active, this comes only after `AFTER` seconds for programs with large temporaries
    (`UpgradingProgram`), and not at all for these on several processes.

    Args:
        traced: a traced function, from ``jax.jit(f).trace(...)``.
        platform: the platform to compile for, such as "cpu".
        own: the user's compiler options.

    `fit` compiles its steps with it. In a loop of your own:

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
        return UpgradingProgram(program, in_pieces)
    return program


def _in_pieces(lowered: Any, jaxpr: Any, own: Mapping[str, Any] | None) -> Any:
    """The program, compiled so that it allocates its memory in pieces; None if malloc would not keep these."""
    pieces = _allowed(malloc.pieces(jaxpr))
    if not pieces:
        return None
    program = lowered.compile(pieces | options("cpu", own))
    return program if malloc.keep(program.memory_analysis().temp_size_in_bytes) else None


class UpgradingProgram:
    """A cached program that a faster one replaces during the run; both compute the same bits.

    The faster program allocates its memory in pieces (`runtime.malloc`), and XLA cannot write it to disk. So the cached
    program runs first. A run that lasts longer than `AFTER` seconds compiles the faster one in a thread, by
    ``successor()``, and continues with it. If that fails, the first program stays.
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
    """Call `make` in a thread of `UpgradingProgram`. Its program is not written to the cache."""
    with compile_cache.unwritten():
        return make()


def _allowed(options: dict[str, Any]) -> dict[str, Any]:
    """The options that this version of XLA knows and that ``XLA_FLAGS`` does not set."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags and _known(name, value)}


@functools.cache
def _known(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option": XLA removes experimental options
        return False
    return True
