"""`Retention`: which checkpoints of a run are kept, and which of them is the best.

`Checkpoints` asks it after each write and removes the others. It reads nothing from disk: it is given the steps that
there are, and the metadata (`Info`) of those whose index can be read.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapwood.core import messages
from sapwood.core.errors import ConfigError
from sapwood.saving.best_metric import Goal, goal

if TYPE_CHECKING:
    from sapwood.saving.checkpoints import Info


@dataclass(frozen=True)
class Retention:
    """The newest `keep` checkpoints stay, and the best one.

    Args:
        keep: number of the newest checkpoints to keep, at least 1.
        best: the metric that decides which checkpoint is best; None if none does.

    Raises:
        ConfigError: `keep` is below 1.

    >>> sorted(Retention(2).kept([10, 20, 30, 40], {}, newest=40))
    [30, 40]
    """

    keep: int
    best: Goal | None = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"keep={self.keep}: at least the newest checkpoint is kept")

    def kept(
        self, steps: Sequence[int], said: Mapping[int, "Info"], *, newest: int, passed: Collection[int] = ()
    ) -> set[int]:
        """The steps to keep: the newest `keep`, the best one, and damaged ones that the run has not reached again.

        Args:
            steps: the steps that have a checkpoint, ascending.
            said: the metadata by step; damaged ones are missing.
            newest: the step that this run restored or saved last. A later checkpoint was written before the run went
                back to an earlier step, so it is removed.
            passed: the steps of damaged checkpoints that were skipped. Nothing else is left of such a step until the
                run has come that far again, so a later one stays.
        """
        ours = [step for step in steps if step <= newest and step not in passed]
        best = self.best_of({step: said[step] for step in ours if step in said})
        return {*ours[-self.keep :], *(step for step in passed if step > newest), *(() if best is None else (best,))}

    def best_of(self, said: Mapping[int, "Info"]) -> int | None:
        """The step with the best metric, the earliest of equals; None if no checkpoint has that metric.

        Without `best`, the metric that the newest of them was saved with decides.
        """
        wanted = self.best or (goal(said[max(said)].best) if said else None)
        return wanted and wanted.best({step: info.metrics.get(wanted.metric, math.nan) for step, info in said.items()})

    def ranked(self, said: Mapping[int, "Info"]) -> list[int]:
        """The steps from the best to the worst metric; those without the metric are left out."""
        left, found = dict(said), []
        while (best := self.best_of(left)) is not None:
            found.append(best)
            del left[best]
        return found

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raise `ConfigError` if metrics are given and lack the one that decides."""
        if self.best is not None and metrics and self.best.metric not in metrics:
            near = messages.nearest(self.best.metric, metrics)
            raise ConfigError(f'best="{self.best}", but the metrics are {sorted(metrics)}{near}')
