"""`Suite`: one race with its systems, its sizes and its goals.

The suites are files of `benchmarks/suites`; each has a tuple `SUITES`.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NAMES = ("mlp", "conv", "gpt", "deep", "input", "checkpoint", "import")
"""The suites of the command line, each a file of `benchmarks/suites`."""
APART = ("gpu",)
"""Suites that `python -m benchmarks` does not run, since they have their own command: benchmarks/gpu.py."""
WAITING = {"lstm": "recurrent layers", "decode": "decoding with a cache"}
"""Suites that are planned, and the feature that each one waits for."""

FLOOR, AGAIN = "floor", "floor again"
"""The hand-written step, and the same step in a second process. Their difference is the noise (A/A).

A race with another floor has that floor's name with " again" as its second.
"""
PEERS = ("linen", "nnx", "haiku", "equinox", "keras", "torch", "torch-compile")
OURS = ("sapwood", "sapwood-step")


@dataclass(frozen=True)
class Goal:
    """A limit on the time of a system in one measure.

    Attributes:
        system: the system.
        against: the system it is compared with; None for a limit in seconds.
        limit: the largest ratio of the two times, or the largest number of seconds.
        measure: the measure; None for the suite's first.
    """

    system: str
    against: str | None
    limit: float
    measure: str | None = None


def beats(system: str, *others: str, measure: str | None = None) -> tuple[Goal, ...]:
    """The goals that ``system`` is faster than each of the others."""
    return tuple(Goal(system, other, 1.0, measure) for other in others)


@dataclass(frozen=True)
class Suite:
    """One race.

    Attributes:
        name: the name of the race; a file of suites may hold several races.
        what: one line for the table and the page.
        systems: the systems that may take part; the first is the floor.
        model: the function in a system's file that builds the job.
        config: sizes, the same for every system.
        weights: makes the canonical tree of initial weights from a generator and ``config``: NumPy arrays in nested
            dicts.
        data: makes the examples from a generator and ``config``: a dict of arrays. The target is "label" or "targets".
        batch_size: examples in a batch.
        epoch: the number of prepared batches, which is an epoch of `fit`.
        steps: steps in a round.
        rounds: the default number of rounds.
        tolerance: the largest relative difference of a loss of the first ten steps from the floor's.
        once: only for a race of fresh processes: the function that each process runs. It returns "seconds" by measure
            and, if it takes steps, "losses". The parent adds the measure "process": the seconds from the start of the
            process to the end of this function.
        measures: the reported measures; the chart shows the first.
        goals: the goals.
        floors: the system that another one's ratio is to, if that is not the first system.
        prepare: writes more files into the working directory.
        threads: the number of threads of every process, if the race fixes it.
    """

    name: str
    what: str
    systems: tuple[str, ...] = (FLOOR, AGAIN, *OURS, *PEERS)
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[np.random.Generator, Mapping[str, Any]], dict] | None = None
    data: Callable[[np.random.Generator, Mapping[str, Any]], dict] | None = None
    batch_size: int = 32
    epoch: int = 64
    steps: int = 1
    rounds: int = 15
    tolerance: float = 1e-3
    once: Callable[[Any], dict[str, Any]] | None = None
    measures: tuple[str, ...] = ("step",)
    goals: tuple[Goal, ...] = ()
    floors: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
    threads: int | None = None

    def floor_of(self, system: str) -> str:
        """The system that the ratio of ``system`` is to."""
        return self.floors.get(system, self.systems[0])


def suites(name: str) -> tuple[Suite, ...]:
    """The races of a suite, by its name on the command line."""
    return importlib.import_module(f"benchmarks.suites.{name.replace('import', 'imports')}").SUITES


def find(race: str) -> Suite:
    """The race of this name, in any suite."""
    return next(suite for name in (*NAMES, *APART) for suite in suites(name) if suite.name == race)
