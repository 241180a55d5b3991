"""The compiled programs of a trainer: each traced and compiled once, the state donated to the training step.

One rule for all of them: each call of `fit`, `evaluate`, `predict` and `init` looks at what the trainer is made of, the
code of its model and all that this names (`core.fingerprint`). As long as that is the same, whatever was traced and
compiled is kept; where anything was edited, all of it is made anew.
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
    """The compiled programs of a config and its code: `train` for shardings of the state, `evaluate`, `predict`."""

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
        """``(params, state, batch, rows) -> metrics`` of the first so many examples, a Python number."""
        return self._compile(remainder_step, self.whole, static_argnums=3)

    @functools.cached_property
    def predict(self) -> Callable[..., Any]:
        """``(params, state, batch) -> outputs``, whole on every device."""
        return self._compile(predict_step, self.whole)

    def train(self, shardings: Any) -> Callable[..., Any]:
        """``(state, batch) -> (state, metrics)`` in place: the state given is used up."""
        return self._compile(train_step, None if shardings is None else (shardings, self.whole), donate_argnums=0)

    def sent(self, shardings: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What `fit` sends, a step and a block: ``(state, key, batch) -> (state, packed metrics)`` in place.

        The run's key, which no step changes, stays outside the state, as its data ``key``: JAX wraps each key that a
        program gives back, in Python.
        """
        alike = tuple(jax.tree.leaves(shardings))
        if alike not in self._sent:
            self._sent[alike] = self._send(shardings)
        return self._sent[alike]

    def compile(self, function: Any, *shapes: Any) -> tuple[Callable[..., Any], float]:
        """A program for arguments of these shapes, plain Python where nothing is compiled, and the seconds that took.

        What JAX need not trace again is not compiled again.
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
        """Of a training step of an accelerator, for which reading its text takes little beside compiling it."""
        config = self.config
        if config.mesh is None or config.platform == "cpu" or getattr(function, "__name__", "") != "train_step":
            return
        try:
            found = parallel.collectives(program, config.place.mesh)
        except jax.errors.JaxRuntimeError:  # programs that this jaxlib cannot print
            return
        itemsize, params = jnp.dtype(config.policy.compute).itemsize, jax.tree.leaves(shapes[0].params)
        if said := excess_traffic_message(found, params, config.batch_sharding, itemsize, config.accumulate):
            warnings.warn(said, parallel.ShardingWarning, stacklevel=2)

    def _send(self, shardings: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        out = None if shardings is None else (shardings.replace(rng=None), self.whole)

        def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            def run(config: Config, state: Any, key: Any, batch: Any) -> Any:
                after, found = function(config, state.replace(rng=jax.random.wrap_key_data(key)), batch)
                return after.replace(rng=None), found

            run.__name__ = name  # what profiles show
            return self._compile(run, out, donate_argnums=0)

        return named(train_one, "train_step"), named(train_block, "train_block")

    def _compile(self, function: Callable[..., Any], out_shardings: Any, **options: Any) -> Callable[..., Any]:
        config = self.config

        def run(*args):
            with config.tracing():
                return function(config, *args)

        run.__name__ = function.__name__  # what profiles show
        if not config.jit:
            return eager(run)
        how = compile_options.options(config.platform, config.compiler_options) or None
        return jax.jit(run, out_shardings=out_shardings, compiler_options=how, **options)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as plain Python, every operation by itself."""

    @functools.wraps(function)
    def run(*args):
        with jax.disable_jit():
            return function(*args)

    return run
