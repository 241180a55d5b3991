"""The learning rate: its value in a step, for the log, and how a callback changes it.

optax keeps a rate in the optimizer state only under `optax.inject_hyperparams`. A schedule passed to
`optax.adam(schedule)` is hidden in a closure. So the rate is found in one of two ways: as
``hyperparams["learning_rate"]`` anywhere in the optimizer state, or by `Trainer(learning_rate=schedule)`, where the
user passes the optimizer's schedule a second time, for the log. The schedule is evaluated where the optimizer evaluates
it: at the optimizer's own count, which under `optax.MultiSteps` differs from the number of batches. The scale of
`optax.contrib.reduce_on_plateau` multiplies the rate in both cases.
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
    """Return the first entry called ``key`` in the optimizer state, or None.

    With ``kind`` only the entries of a named tuple of that name count.
    """

    def wanted(path, _):
        return kind is None or getattr(path[-1], "tuple_name", None) == kind

    found = optax.tree.get_all_with_path(opt_state, key, filtering=wanted)
    return found[0][1] if found else None


def update_count(opt_state: Any) -> Any:
    """Return how many updates the optimizer's schedule has seen, from its state; None if the state has no count."""
    kinds = ("count", "ScaleByScheduleState"), ("count", "WrappedScheduleState"), ("gradient_step", "MultiStepsState")
    found = (_find(opt_state, key, kind) for key, kind in kinds)
    return next((x for x in found if x is not None), None)


def rate_metrics(schedule: Any, before: TrainState, opt_state: Any) -> dict[str, Last]:
    """Make the metrics that log the learning rate of a step.

    Args:
        schedule: the schedule, number or None that the trainer was given as ``learning_rate``.
        before: the state before the step.
        opt_state: the optimizer state after the step.

    Returns:
        The rate under "learning_rate". If only the scale of `optax.contrib.reduce_on_plateau` is known, that under
        "plateau_scale"; otherwise an empty dict.

    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    >>> state = TrainState(step=6, params={}, state={}, opt_state=(), rng=None)
    >>> {name: float(x.compute()) for name, x in rate_metrics(None, state, tx.init({"w": jnp.ones(2)})).items()}
    {'learning_rate': 0.25}
    >>> float(rate_metrics(optax.linear_schedule(1.0, 0.0, 8), state, ())["learning_rate"].compute())
    0.25
    >>> rate_metrics(None, state, optax.sgd(0.25).init({"w": jnp.ones(2)}))
    {}
    """
    rate, scale = _find(opt_state, NAME), _find(opt_state, "scale", "ReduceLROnPlateauState")
    if rate is None and schedule is not None:
        rate = jnp.asarray(schedule(_updates(before)) if callable(schedule) else schedule, jnp.float32)
    if rate is not None:
        return {NAME: Last(rate if scale is None else rate * scale)}
    return {} if scale is None else {SCALE: Last(scale)}


def _updates(state: TrainState) -> Any:
    """Return the number of updates before this step.

    It is the optimizer's own count, or else the number of steps that loss scaling did not skip.
    """
    own = update_count(state.opt_state)
    if own is not None:
        return own
    return state.step if state.scale is None else state.step - state.scale.skipped


def multiply_rates(opt_state: Any, factor: float, least: float, who: str) -> tuple[Any, float]:
    """Multiply each learning rate in an optimizer state by a factor.

    Args:
        opt_state: the optimizer state.
        factor: factor for each rate.
        least: the rate does not fall below this; a rate that is below already does not rise.
        who: name of the caller, for the message.

    Returns:
        The new optimizer state, and its largest rate.

    Raises:
        ConfigError: the state holds no learning rate, or one that a schedule sets in each step.

    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    >>> multiply_rates(tx.init({"w": jnp.ones(2)}), 0.1, 0.1, "me")[1]
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
