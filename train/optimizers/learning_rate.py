"""The learning rate: that of a step, for the log, and how a callback changes it.

optax keeps a rate in its state only under `optax.inject_hyperparams`; a schedule passed to `optax.adam(schedule)` is
hidden in a closure. So it is found in one of two ways: ``hyperparams["learning_rate"]`` anywhere in the optimizer's
state, or `Trainer(learning_rate=schedule)`, the schedule the optimizer was made with, given once more to be logged. It
is read where the optimizer reads it: at the optimizer's own count, which under `optax.MultiSteps` is not that of the
batches. The scale of `optax.contrib.reduce_on_plateau` multiplies either.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapwood.core.errors import ConfigError
from sapwood.metrics import Last
from sapwood.train.state.train_state import TrainState

NAME, SCALE = "learning_rate", "plateau_scale"


def _find(opt_state: Any, key: str, kind: str | None = None) -> Any:
    """The first entry called ``key`` in the optimizer's state, in a tuple called ``kind`` if given; else None."""

    def wanted(path, _):
        return kind is None or getattr(path[-1], "tuple_name", None) == kind

    found = optax.tree.get_all_with_path(opt_state, key, filtering=wanted)
    return found[0][1] if found else None


def count(opt_state: Any) -> Any:
    """How many updates the optimizer's schedule has seen, as its state says; None where it does not."""
    kinds = ("count", "ScaleByScheduleState"), ("count", "WrappedScheduleState"), ("gradient_step", "MultiStepsState")
    found = (_find(opt_state, key, kind) for key, kind in kinds)
    return next((x for x in found if x is not None), None)


def logged(schedule: Any, before: TrainState, opt_state: Any) -> dict[str, Last]:
    """The metrics that name the learning rate of a step, from the schedule (or number, or None) that the trainer was
    given, the state before the step, and the optimizer's state after it.

    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    >>> state = TrainState(step=6, params={}, state={}, opt_state=(), rng=None)
    >>> {name: float(x.compute()) for name, x in logged(None, state, tx.init({"w": jnp.ones(2)})).items()}
    {'learning_rate': 0.25}
    >>> float(logged(optax.linear_schedule(1.0, 0.0, 8), state, ())["learning_rate"].compute())
    0.25
    >>> logged(None, state, optax.sgd(0.25).init({"w": jnp.ones(2)}))
    {}
    """
    rate, scale = _find(opt_state, NAME), _find(opt_state, "scale", "ReduceLROnPlateauState")
    if rate is None and schedule is not None:
        rate = jnp.asarray(schedule(_updates(before)) if callable(schedule) else schedule, jnp.float32)
    if rate is not None:
        return {NAME: Last(rate if scale is None else rate * scale)}
    return {} if scale is None else {SCALE: Last(scale)}


def _updates(state: TrainState) -> Any:
    """The number of updates before this step: the optimizer's own, or the steps that loss scaling did not skip."""
    own = count(state.opt_state)
    if own is not None:
        return own
    return state.step if state.scale is None else state.step - state.scale.skipped


def multiplied(opt_state: Any, factor: float, least: float, who: str) -> tuple[Any, float]:
    """The optimizer's state with each learning rate in it times ``factor``, not below ``least``, nor above what it was;
    and the largest one.

    Raises `ConfigError` where it holds none, or one that a schedule sets anew in each step.

    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    >>> multiplied(tx.init({"w": jnp.ones(2)}), 0.1, 0.1, "me")[1]
    0.1
    """
    names = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
    if not any(x[-2:] == ["hyperparams", NAME] for x in names):
        raise ConfigError(
            f"{who} changes the learning rate in the optimizer's state, which holds none: make the optimizer by "
            f"optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)"
        )
    if any("hyperparams_states" in x and NAME in x for x in names):
        raise ConfigError(f"{who} changes the learning rate, which a schedule sets anew in each step: give it a number")
    rates = []

    def one(path: Any, x: Any) -> Any:
        if _names(path)[-2:] != ["hyperparams", NAME]:
            return x
        rate = float(jax.device_get(x))
        rates.append(max(rate * factor, min(rate, least)))
        return jax.device_put(np.asarray(rates[-1], x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(one, opt_state), max(rates)


def _names(path: Any) -> list[Any]:
    return [getattr(key, "name", getattr(key, "key", None)) for key in path]
