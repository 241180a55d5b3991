"""`Suite`: what is raced, by whom, and what counts as won."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NAMES = ("mlp", "conv", "gpt", "deep", "input", "checkpoint", "import")
"""The suites of the command line, each a file of `benchmarks/suites`."""
APART = ("gpu",)
"""Suites that have a command of their own: benchmarks/gpu.py."""
WAITING = {"lstm": "recurrent layers", "decode": "decoding with a cache"}
"""Suites that have a name and a place, and wait for what they would measure."""

FLOOR, AGAIN = "floor", "floor again"
"""The hand-written step, and the same thing in another process: what they differ by is the noise (A/A). In a race with
another floor, that one's name with " again" is the second."""
PEERS = ("linen", "nnx", "haiku", "equinox", "keras", "torch", "torch-compile")
OURS = ("sapwood", "sapwood-step")


@dataclass(frozen=True)
class Goal:
    """``system`` costs at most ``limit`` times what ``against`` costs, or so many seconds where that is None, in one
    measure (the suite's first)."""

    system: str
    against: str | None
    limit: float
    measure: str | None = None


def beats(system: str, *others: str, measure: str | None = None) -> tuple[Goal, ...]:
    """``system`` is faster than each of the others."""
    return tuple(Goal(system, other, 1.0, measure) for other in others)


@dataclass(frozen=True)
class Suite:
    """One race.

    Attributes:
        name: of this race; a file of suites may hold several.
        what: one line for the table and the page.
        model: the function of a system's file that builds it.
        systems: who takes part; the first is the floor.
        config: sizes, given to every system.
        weights: makes the canonical tree of first weights, NumPy arrays in nested dicts, from a generator.
        data: makes the examples, a dict of arrays; "label" or "targets" is what is learned.
        batch_size, epoch: examples of a batch; batches that are prepared, an epoch of `fit`.
        steps: of a round.
        rounds: by default.
        tolerance: how far, relatively, a loss of the first ten steps may be from the floor's.
        once: for a race of fresh processes: what each does, giving "seconds" by measure (the parent adds "process":
            from the start of the process to this function's end) and, if it takes steps, "losses".
        measures: what is reported; the first is what the chart shows.
        goals: what counts as won.
        floors: which system another one's ratio is to, where it is not the first.
        prepare: writes more files into the working directory.
        threads: of every process, where that is part of the race.
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
        """The system that this one's ratio is to."""
        return self.floors.get(system, self.systems[0])


def suites(name: str) -> tuple[Suite, ...]:
    """The races of one name of the command line."""
    return importlib.import_module(f"benchmarks.suites.{name.replace('import', 'imports')}").SUITES


def find(race: str) -> Suite:
    """A race by its own name."""
    return next(suite for name in (*NAMES, *APART) for suite in suites(name) if suite.name == race)
