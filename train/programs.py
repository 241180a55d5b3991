"""The compiled programs of a trainer: each traced and compiled once, the state donated to the training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from sapwood import parallel
from sapwood.train import compiling
from sapwood.train.evaluation import evaluate_step, predict_step, remainder_step
from sapwood.train.multistep import train_block, train_one
from sapwood.train.step import train_step


class Programs:
    """What a `Trainer` runs: `train` for shardings of the state, `evaluate`, `predict`; and `plans`, `birth.plan`'s."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.plans: dict[Any, Any] = {}
        self.whole = None if trainer.mesh is None else parallel.replicated(trainer.mesh)

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
        out = None if shardings is None else (shardings.replace(rng=None), self.whole)

        def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            def run(trainer: Any, state: Any, key: Any, batch: Any) -> Any:
                after, found = function(trainer, state.replace(rng=jax.random.wrap_key_data(key)), batch)
                return after.replace(rng=None), found

            run.__name__ = name
            return self._compile(run, out, donate_argnums=0)

        return named(train_one, "train_step"), named(train_block, "train_block")

    def _compile(self, function: Callable[..., Any], out_shardings: Any, **options: Any) -> Callable[..., Any]:
        trainer = self.trainer

        def run(*args):
            with trainer.compiling():
                return function(trainer, *args)

        run.__name__ = function.__name__  # what profiles show
        if not trainer.jit:
            return eager(run)
        how = compiling.options(trainer.platform)
        return jax.jit(run, out_shardings=out_shardings, compiler_options=how, **options)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as plain Python, every operation by itself."""

    @functools.wraps(function)
    def run(*args):
        with jax.disable_jit():
            return function(*args)

    return run
