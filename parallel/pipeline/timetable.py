"""Pipeline schedules as data: which stage runs which micro-batch of which round at which tick.

What runs is read from these tables (`stages`), so a bubble counted here is the bubble there is.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sapwood.core.errors import ConfigError

IDLE = -1


@dataclass(frozen=True)
class Timetable:
    """What each stage does at each tick: `forward(...)` and `forward_backward(...)` make one.

    Attributes:
        microbatch: the micro-batch `(ticks, stages)` whose forward pass a stage runs, -1 where it has none.
        round: the round `(ticks, stages)` that pass belongs to: which of its pieces of the stack a stage runs.
        backward: the micro-batch `(ticks, stages)` whose backward pass a stage runs in the same tick; None where the
            backward pass is the forward pass run backwards, which has the same bubble.
    """

    microbatch: np.ndarray
    round: np.ndarray
    backward: np.ndarray | None = None

    @property
    def ticks(self) -> int:
        """How long it takes."""
        return len(self.microbatch)

    @property
    def stages(self) -> int:
        """How many stages it is for."""
        return self.microbatch.shape[1]

    @cached_property
    def bubble(self) -> float:
        """The share of all slots, stages x ticks, in which a stage has nothing to do."""
        tables = [self.microbatch] if self.backward is None else [self.microbatch, self.backward]
        return float(np.mean([table == IDLE for table in tables]))

    def entering(self) -> np.ndarray:
        """For each tick the micro-batch whose way through the stack begins, at the first stage; -1 where none does."""
        return np.where(self.round[:, 0] == 0, self.microbatch[:, 0], IDLE)

    def leaving(self) -> np.ndarray:
        """For each tick the micro-batch whose way through the stack ends, at the last stage; -1 where none does."""
        return np.where(self.round[:, -1] == self.round.max(), self.microbatch[:, -1], IDLE)

    def when(self) -> np.ndarray:
        """The tick `(stages, rounds, micro-batches)` of each piece of work."""
        found = np.full((self.stages, self.round.max() + 1, self.microbatch.max() + 1), IDLE)
        for tick, stage in np.argwhere(self.microbatch != IDLE):
            found[stage, self.round[tick, stage], self.microbatch[tick, stage]] = tick
        return found

    def __str__(self) -> str:
        """A line for each stage, a column for each tick: the micro-batch, and with several rounds a letter for each."""
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
    """The forward pass: a stage works on what the stage before it worked on a tick ago.

    With one round it is GPipe (Huang et al. 2019, arXiv:1811.06965), with more it is interleaved (Narayanan et al.
    2021, arXiv:2104.04473): each stage has `rounds` pieces of the stack, and `stages` micro-batches at a time go round
    all stages `rounds` times, without ever waiting. The bubble is (stages - 1) / (rounds x microbatches + stages - 1).

    >>> print(forward(stages=2, microbatches=4))
    stage 0  0  1  2  3  .
    stage 1  .  0  1  2  3
    >>> print(forward(stages=2, microbatches=2, rounds=2))
    stage 0 0a 1a 0b 1b  .
    stage 1  . 0a 1a 0b 1b
    >>> forward(2, 4).bubble == 1 / 5
    True

    Raises `ConfigError` for several rounds of micro-batches that are no multiple of the stages.
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
    """One forward, one backward: the last stage starts on a micro-batch's backward pass as soon as it has it.

    At most 2 x stages - 1 micro-batches are between their two passes, however many there are (`in_flight`), which is
    what PipeDream-flush (Narayanan et al. 2021, arXiv:2006.09503) is for. A tick has room for a forward and a backward
    pass, so the bubble is 2 (stages - 1) / (microbatches + 2 (stages - 1)).

    >>> print(forward_backward(stages=2, microbatches=3))
    stage 0  0|.  1|.  2|0  .|1  .|2
    stage 1  .|.  0|0  1|1  2|2  .|.
    """
    tick, stage = np.arange(microbatches + 2 * (stages - 1))[:, None], np.arange(stages)
    first, second = tick - stage, tick - 2 * (stages - 1) + stage
    busy, back = ((table >= 0) & (table < microbatches) for table in (first, second))
    return Timetable(np.where(busy, first, IDLE), np.zeros_like(first), np.where(back, second, IDLE))


def in_flight(table: Timetable) -> int:
    """The most micro-batches any stage holds between their forward and their backward pass.

    >>> in_flight(forward_backward(stages=4, microbatches=100)), in_flight(forward(stages=4, microbatches=100))
    (7, 100)
    """
    if table.backward is None:
        return int((table.microbatch != IDLE).sum(0).max())  # all of them
    begun, ended = (np.cumsum(t != IDLE, 0) for t in (table.microbatch, table.backward))
    return int((begun - ended + (table.backward != IDLE)).max())
