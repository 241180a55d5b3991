"""Pipeline schedules as data: which stage runs which micro-batch of which round at which tick.

`forward` makes the schedules "gpipe" and "interleaved", and `forward_backward` makes "1f1b". The engine runs what these
tables say, so a bubble counted here is the bubble of the program.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sapwood.core.errors import ConfigError

IDLE = -1
"""The entry of a table where a stage has nothing to do."""


@dataclass(frozen=True)
class Timetable:
    """What each stage does at each tick. `forward(...)` and `forward_backward(...)` make one.

    Attributes:
        microbatch: `(ticks, stages)`, the micro-batch whose forward pass a stage runs; -1 if it runs none.
        round: `(ticks, stages)`, the round of that pass: which of its pieces of the stack the stage runs.
        backward: `(ticks, stages)`, the micro-batch whose backward pass a stage runs in the same tick; -1 if it runs
            none. None if the backward pass is the forward pass in reverse, which has the same bubble.
    """

    microbatch: np.ndarray
    round: np.ndarray
    backward: np.ndarray | None = None

    @property
    def ticks(self) -> int:
        """Number of ticks."""
        return len(self.microbatch)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.microbatch.shape[1]

    @cached_property
    def bubble(self) -> float:
        """The fraction of all slots, stages x ticks, in which a stage has nothing to do."""
        tables = [self.microbatch] if self.backward is None else [self.microbatch, self.backward]
        return float(np.mean([table == IDLE for table in tables]))

    def entering(self) -> np.ndarray:
        """`(ticks,)`: the micro-batch that enters the first stage, in its first round; -1 if none does."""
        return np.where(self.round[:, 0] == 0, self.microbatch[:, 0], IDLE)

    def leaving(self) -> np.ndarray:
        """`(ticks,)`: the micro-batch that leaves the last stage, after its last round; -1 if none does."""
        return np.where(self.round[:, -1] == self.round.max(), self.microbatch[:, -1], IDLE)

    def when(self) -> np.ndarray:
        """`(stages, rounds, micro-batches)`: the tick of each forward pass."""
        found = np.full((self.stages, self.round.max() + 1, self.microbatch.max() + 1), IDLE)
        for tick, stage in np.argwhere(self.microbatch != IDLE):
            found[stage, self.round[tick, stage], self.microbatch[tick, stage]] = tick
        return found

    def __str__(self) -> str:
        """A line for each stage and a column for each tick.

        An entry is the micro-batch; with several rounds, a letter for the round; after "|" the micro-batch of the
        backward pass. "." is an idle slot.
        """
        several = self.round.max() > 0
        lines = []
        for stage in range(self.stages):
            cells = []
            for tick in range(self.ticks):
                m, r = self.microbatch[tick, stage], self.round[tick, stage]
                cell = "." if m == IDLE else f"{m}{chr(ord('a') + r)}" if several else f"{m}"
                if self.backward is not None:
                    b = self.backward[tick, stage]
                    cell += "|" + ("." if b == IDLE else f"{b}")
                cells.append(f"{cell:>{5 if self.backward is not None else 3}}")
            lines.append(f"stage {stage}" + "".join(cells))
        return "\n".join(lines)


def forward(stages: int, microbatches: int, rounds: int = 1) -> Timetable:
    """The forward pass: a stage works on the micro-batch that the previous stage had one tick earlier.

    With one round it is GPipe (Huang et al. 2019, arXiv:1811.06965). With more it is interleaved (Narayanan et al.
    2021, arXiv:2104.04473): each stage has `rounds` pieces of the stack, and `stages` micro-batches at a time go
    through all stages `rounds` times without waiting. The bubble is
    (stages - 1) / (rounds x microbatches + stages - 1).

    >>> print(forward(stages=2, microbatches=4))
    stage 0  0  1  2  3  .
    stage 1  .  0  1  2  3
    >>> print(forward(stages=2, microbatches=2, rounds=2))
    stage 0 0a 1a 0b 1b  .
    stage 1  . 0a 1a 0b 1b
    >>> forward(2, 4).bubble == 1 / 5
    True

    Raises:
        ConfigError: there are several rounds, and `microbatches` is no multiple of `stages`.
    """
    if rounds > 1 and microbatches % stages:
        below = microbatches - microbatches % stages
        near = f"{below} or {below + stages}" if below else f"{stages}"
        raise ConfigError(
            f"an interleaved schedule sends {stages} micro-batches at a time round its {stages} stages, and "
            f"{microbatches} micro-batches are no multiple of {stages}; take {near}"
        )
    item = np.arange(rounds * microbatches + stages - 1)[:, None] - np.arange(stages)
    busy = (item >= 0) & (item < rounds * microbatches)
    if rounds == 1:
        return Timetable(np.where(busy, item, IDLE), np.zeros_like(item))
    group, within = np.divmod(item, stages * rounds)
    microbatch, turn = group * stages + within % stages, within // stages
    return Timetable(np.where(busy, microbatch, IDLE), np.where(busy, turn, 0))


def forward_backward(stages: int, microbatches: int) -> Timetable:
    """One forward, one backward (1f1b): the last stage runs both passes of a micro-batch in the same tick.

    At most 2 x stages - 1 micro-batches are between their two passes, for every number of micro-batches (`in_flight`).
    That is the purpose of PipeDream-flush (Narayanan et al. 2021, arXiv:2006.09503). A tick has room for a forward and
    a backward pass, so the bubble is 2 (stages - 1) / (microbatches + 2 (stages - 1)).

    >>> print(forward_backward(stages=2, microbatches=3))
    stage 0  0|.  1|.  2|0  .|1  .|2
    stage 1  .|.  0|0  1|1  2|2  .|.
    """
    tick, stage = np.arange(microbatches + 2 * (stages - 1))[:, None], np.arange(stages)
    first, second = tick - stage, tick - 2 * (stages - 1) + stage
    busy, back = ((table >= 0) & (table < microbatches) for table in (first, second))
    return Timetable(np.where(busy, first, IDLE), np.zeros_like(first), np.where(back, second, IDLE))


def in_flight(table: Timetable) -> int:
    """The largest number of micro-batches that a stage holds between their forward and their backward pass.

    >>> in_flight(forward_backward(stages=4, microbatches=100)), in_flight(forward(stages=4, microbatches=100))
    (7, 100)
    """
    if table.backward is None:
        return int((table.microbatch != IDLE).sum(0).max())  # all: backward passes start after the last forward one
    begun, ended = (np.cumsum(t != IDLE, 0) for t in (table.microbatch, table.backward))
    return int((begun - ended + (table.backward != IDLE)).max())
