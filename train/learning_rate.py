"""The learning rate of a step, for the log: read from the optimizer's state where it is, else from a given schedule.

optax keeps a rate in its state only under `optax.inject_hyperparams`; a schedule passed to `optax.adam(schedule)` is
hidden in a closure. So it is found in one of two ways: ``hyperparams["learning_rate"]`` anywhere in the optimizer's
state, or `Trainer(learning_rate=schedule)`, the schedule the optimizer was made with, given once more to be logged. The
scale of `optax.contrib.reduce_on_plateau` multiplies either.
"""

from typing import Any

import optax

from sapwood.train.metrics import Last

NAME, SCALE = "learning_rate", "plateau_scale"


def _find(opt_state: Any, key: str, kind: str | None = None) -> Any:
    """The first entry called ``key`` in the optimizer's state, in a tuple called ``kind`` if given; else None."""

    def wanted(path, _):
        return kind is None or getattr(path[-1], "tuple_name", None) == kind

    found = optax.tree.get_all_with_path(opt_state, key, filtering=wanted)
    return found[0][1] if found else None


def logged(opt_state: Any) -> dict[str, Last]:
    """The metrics that name the learning rate, straight from the optimizer's state; nothing is computed unless both
    are there.

    >>> import jax.numpy as jnp
    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    >>> {name: float(x.compute()) for name, x in logged(tx.init({"w": jnp.ones(2)})).items()}
    {'learning_rate': 0.25}
    >>> logged(optax.sgd(0.25).init({"w": jnp.ones(2)}))
    {}
    """
    rate, scale = _find(opt_state, NAME), _find(opt_state, "scale", "ReduceLROnPlateauState")
    if rate is not None:
        return {NAME: Last(rate if scale is None else rate * scale)}
    return {} if scale is None else {SCALE: Last(scale)}


def complete(row: dict[str, Any], schedule: Any, updates: int) -> dict[str, Any]:
    """A row of values with the rate of the given schedule (or number) after ``updates`` optimizer steps.

    >>> complete({"loss": 1.0, "plateau_scale": 0.5}, optax.linear_schedule(1.0, 0.0, 10), 6)
    {'loss': 1.0, 'plateau_scale': 0.5, 'learning_rate': 0.25}
    """
    if schedule is None:
        return row
    rate: Any = schedule(updates - 1) if callable(schedule) else schedule
    return {**row, NAME: float(rate) * row.get(SCALE, 1.0)}
