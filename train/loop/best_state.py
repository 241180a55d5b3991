"""The best state of a run: which metric decides, and a copy of the state for runs without a directory.

`wanted` finds the goal of a run, from `fit(best=)`, from callbacks and from the resumed run. With a run directory, the
best checkpoint stays there (`Run.best`). Without one, `Kept` holds a copy of the best state on the devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sapwood.core.errors import ConfigError
from sapwood.runtime.processes import any_process
from sapwood.saving.best_metric import Goal, goal
from sapwood.train.callbacks import Callback, EarlyStopping, better, value
from sapwood.train.loop.blocks import copy


def wanted(best: Any, callbacks: Sequence[Callback], before: str | None = None, anyway: bool = False) -> Goal | None:
    """Return the goal of a run: the metric that decides which state is best, and whether "min" or "max" of it is best.

    A run with a goal ends with its best state. None means that the run ends with its last state.

    Args:
        best: the option of `fit`, such as "max:accuracy", or None.
        callbacks: the callbacks of `fit`. The ``mode`` and ``monitor`` of an `EarlyStopping(restore=True)` are a goal,
            too.
        before: the goal of the run that is resumed, such as "max:accuracy", or None. It is used if nothing else gives a
            goal.
        anyway: True lets a resumed run have another goal than before.

    Raises:
        ConfigError: these goals differ, or only some processes have an `EarlyStopping(restore=True)`.
    """
    stopping = {Goal(c.mode, c.monitor) for c in callbacks if isinstance(c, EarlyStopping) and c.restore}
    if any_process(bool(stopping)) and any_process(not stopping):
        raise ConfigError("fit(callbacks=...): EarlyStopping(restore=True) is given to every process, or to none")
    goals = stopping | ({goal(best)} - {None})
    if len(goals) > 1:
        said = " and ".join(sorted(f'"{one}"' for one in goals))
        raise ConfigError(f"fit: best= and EarlyStopping(restore=True) want {said}; a run ends with one best state")
    now = next(iter(goals), None)
    if before is not None and not anyway and now not in (None, goal(before)):
        raise ConfigError(f'fit(resume=True): the run keeps the best by "{before}", not by "{now}"; resume="anyway" '
                          "goes on by the new one")  # fmt: skip
    return now or goal(before)


class Kept:
    """A copy of the best state so far, on the devices, for a run without a directory.

    Attributes:
        goal: the metric, and whether its smallest or its largest value is best.
        value: the best value of the metric so far; NaN before the first number.
        state: the copy, or None.
    """

    def __init__(self, goal: Goal):
        self.goal, self.value, self.state = goal, math.nan, None

    def offer(self, row: Mapping[str, Any], state: Any) -> None:
        """Keep a copy of the state if the row, which closes an epoch, has the best value so far."""
        new = value(row, self.goal.metric, f'best="{self.goal}"')
        first = math.isnan(self.value) and not math.isnan(new)
        if first or better(new, self.value, self.goal.mode):
            rng, rest = state.rng, state.replace(rng=None)  # no step donates the key, so it needs no copy
            self.value, self.state = new, jax.tree.map(copy, rest).replace(rng=rng)
