"""The best state of a run, where `fit` is to end with it and not with the last."""

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
    """What `fit` shall end with: what ``best=`` says, or an `EarlyStopping(restore=True)`, or the run that it resumes.

    `ConfigError` where these mean different things, and where not all processes have that callback. A run that goes on
    ``anyway`` may want another best than before.
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
    """The best state so far where no directory keeps it: a copy of it on the devices."""

    def __init__(self, goal: Goal):
        self.goal, self.value, self.state = goal, math.nan, None

    def offer(self, row: Mapping[str, Any], state: Any) -> None:
        """Keep a copy of the state of a row that closes an epoch, if it is better."""
        new = value(row, self.goal.metric, f'best="{self.goal}"')
        first = math.isnan(self.value) and not math.isnan(new)
        if first or better(new, self.value, self.goal.mode):
            rng, rest = state.rng, state.replace(rng=None)  # the key is never used up
            self.value, self.state = new, jax.tree.map(copy, rest).replace(rng=rng)
