"""The statistics of a race: ratios within rounds, their median and interval, and whether a goal is met."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.suite import Goal, Suite

Rounds = Sequence[Mapping[str, Mapping[str, float]]]
"""For each round, the seconds by system and measure."""


class Interval(NamedTuple):
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def interval(ratios: Sequence[float]) -> Interval:
    """The median and its 95 % interval, by the bootstrap over rounds.

    >>> interval([1.0, 1.0, 1.0])
    Interval(median=1.0, low=1.0, high=1.0)
    """
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Interval(float(np.median(ratios)), float(low), float(high))


def ratio(rounds: Rounds, system: str, to: str, measure: str) -> Interval:
    """The time of a system divided by that of another one in the same round."""
    return interval([r[system][measure] / r[to][measure] for r in rounds if system in r and to in r])


def outcome(goal: Goal, rounds: Rounds, measure: str) -> Interval:
    """The quantity that a goal limits: a ratio, or seconds if it has no ``against``."""
    if goal.against is None:
        return interval([r[goal.system][measure] for r in rounds if goal.system in r])
    return ratio(rounds, goal.system, goal.against, measure)


NOISE = 0.1
"""The largest noise that `met` allows for. A noisier race says nothing, so noise must not win it."""


def noise(suite: Suite, rounds: Rounds, measure: str) -> float:
    """Half the width of the A/A interval, at most `NOISE`; 0 if the race does not run the floor twice."""
    floor = suite.systems[0]
    if not any(f"{floor} again" in r for r in rounds):
        return 0.0
    return min(ratio(rounds, f"{floor} again", floor, measure).half_width, NOISE)


def met(goal: Goal, found: Interval, noise: float) -> bool:
    """True if a goal is met: the median is at most the limit, and the upper bound is below the limit plus ``noise``.

    The condition on the median keeps a noisy machine from meeting every goal.

    >>> met(Goal("sapwood", "floor", 1.0), Interval(0.99, 0.97, 1.01), noise=0.02)
    True
    >>> met(Goal("sapwood", "floor", 1.0), Interval(0.99, 0.97, 1.03), noise=0.02)
    False
    >>> met(Goal("sapwood", "floor", 1.0), Interval(1.01, 0.99, 1.02), noise=0.1)
    False
    """
    return found.median <= goal.limit and found.high < goal.limit + noise
