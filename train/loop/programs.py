"""`Programs`: the compiled programs of a trainer, each traced and compiled once.

Training programs donate the state. Each call of `fit`, `evaluate`, `predict` and `init` takes the fingerprint of the
trainer: of its fields, the code of its model and everything that this names (`core.fingerprint`). As long as it is the
same, all programs are kept. After any edit, all of them are traced and compiled again.
"""

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sapwood import parallel
from sapwood.parallel.excess_traffic import excess_traffic_message
from sapwood.runtime import compile_options
from sapwood.train.config import Code, Config
from sapwood.train.loop.blocks import train_block, train_one
from sapwood.train.step.evaluate import evaluate_step, predict_step, remainder_step
from sapwood.train.step.step import train_step


class Programs:
    """The compiled programs of a config and its code.

    Attributes:
        config: the config.
        code: its `Code` when these programs were made.
        whole: the replicated sharding on the mesh; None without a mesh.
    """

    def __init__(self, config: Config, code: Code):
        self.config, self.code = config, code
        self.whole = None if config.mesh is None else parallel.replicated(config.mesh)
        self._sent: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._compiled: dict[Any, tuple[Callable[..., Any], float]] = {}

    @functools.cached_property
    def evaluate(self) -> Callable[..., Any]:
        """``(params, state, batch) -> metrics``"""
        return self._compile(evaluate_step, self.whole)

    @functools.cached_property
    def remainder(self) -> Callable[..., Any]:
        """``(params, state, batch, rows) -> metrics`` of the first ``rows`` examples, a static Python integer."""
        return self._compile(remainder_step, self.whole, static_argnums=3)

    @functools.cached_property
    def predict(self) -> Callable[..., Any]:
        """``(params, state, batch) -> outputs``, replicated over the devices."""
        return self._compile(predict_step, self.whole)

    def train(self, shardings: Any) -> Callable[..., Any]:
        """Return the training step ``(state, batch) -> (state, metrics)`` for shardings of the state, or None.

        The state is donated.
        """
        return self._compile(train_step, None if shardings is None else (shardings, self.whole), donate_argnums=0)

    def sent(self, shardings: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the two functions that `fit` sends: a step, and a block of steps.

        Both are ``(state, key, batch) -> (state, packed metrics)``, and the state is donated. ``key`` is the data of
        the run's key, which no step changes. The key is kept out of the state, because JAX wraps every key that a
        program returns in Python code, which takes time in each call.
        """
        alike = tuple(jax.tree.leaves(shardings))
        if alike not in self._sent:
            self._sent[alike] = self._send(shardings)
        return self._sent[alike]

    def compile(self, function: Any, *shapes: Any) -> tuple[Callable[..., Any], float]:
        """Compile a function for arguments of these shapes. Returns the program, and the seconds that this took.

        With ``jit=False`` the program is the function itself. If the same jaxpr was compiled before, for the same
        shardings and default device, that program is returned, with the seconds that it took then.
        """
        if not self.config.jit:
            return function, 0.0
        begun = time.perf_counter()
        traced = function.trace(*shapes)
        places = tuple(getattr(x, "sharding", None) for x in jax.tree.leaves(shapes))
        alike = traced.jaxpr, places, jax.config.jax_default_device  # type: ignore[attr-defined]
        if alike not in self._compiled:
            program = compile_options.compiled(traced, self.config.platform, self.config.compiler_options)
            self._warn_of_excess(function, program, shapes)
            self._compiled[alike] = program, time.perf_counter() - begun
        return self._compiled[alike]

    def _warn_of_excess(self, function: Any, program: Any, shapes: Any) -> None:
        """Warn of a training step that sends much more between devices than FSDP needs.

        This is done on a mesh of an accelerator only, where reading the program's text takes little time compared with
        compiling it.
        """
        config = self.config
        if config.mesh is None or config.platform == "cpu" or getattr(function, "__name__", "") != "train_step":
            return
        try:
            found = parallel.collectives(program, config.place.mesh)
        except jax.errors.JaxRuntimeError:  # this jaxlib cannot print the program
            return
        itemsize, params = jnp.dtype(config.policy.compute).itemsize, jax.tree.leaves(shapes[0].params)
        if said := excess_traffic_message(found, params, config.batch_sharding, itemsize, config.accumulate):
            warnings.warn(said, parallel.ShardingWarning, stacklevel=2)

    def _send(self, shardings: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Make the two functions of `sent`."""
        out = None if shardings is None else (shardings.replace(rng=None), self.whole)

        def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            def run(config: Config, state: Any, key: Any, batch: Any) -> Any:
                after, found = function(config, state.replace(rng=jax.random.wrap_key_data(key)), batch)
                return after.replace(rng=None), found

            run.__name__ = name  # the name in profiles
            return self._compile(run, out, donate_argnums=0)

        return named(train_one, "train_step"), named(train_block, "train_block")

    def _compile(self, function: Callable[..., Any], out_shardings: Any, **options: Any) -> Callable[..., Any]:
        """Return `jax.jit` of ``function`` with the config as its first argument; with ``jit=False``, plain Python."""
        config = self.config

        def run(*args):
            with config.tracing():
                return function(config, *args)

        run.__name__ = function.__name__  # the name in profiles
        if not config.jit:
            return eager(run)
        how = compile_options.options(config.platform, config.compiler_options) or None
        return jax.jit(run, out_shardings=out_shardings, compiler_options=how, **options)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as plain Python, in which every operation runs by itself."""

    @functools.wraps(function)
    def run(*args):
        with jax.disable_jit():
            return function(*args)

    return run
