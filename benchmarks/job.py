"""`Job`: what a system gives to the worker process, which reports its first losses and runs its timed rounds.

A `Job` controls its own rounds, since `fit` of some libraries is one long call. `Loop` is the job of a library that has
only a training step.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Channel(Protocol):
    """The connection of a job to the parent process."""

    def wait(self) -> None:
        """Block until the parent starts the next round. The process ends if the parent closed the connection."""

    def report(self, **message: Any) -> None:
        """Send a message to the parent."""


class Job(Protocol):
    def losses(self, steps: int) -> list[float]:
        """The losses of the first ``steps`` steps from the initial weights."""

    def rounds(self, channel: Channel, steps: int) -> None:
        """Forever: wait, run ``steps`` steps, report the seconds a step. Does not return."""


@dataclass
class Loop:
    """The job of a library without a training loop of its own.

    Attributes:
        step: ``step(*batch)`` updates the model and returns the loss.
        batches: batches that are on the device already; they are used in a cycle.
        wait: ``wait(loss)`` blocks until the loss is computed.
        value: converts a loss to a float.
        lower: lowers the program of a step; None if there is no single program.
        program: returns the compiled program of a step; None if there is no single program.
    """

    step: Callable[..., Any]
    batches: list[tuple]
    wait: Callable[[Any], Any]
    value: Callable[[Any], float] = float
    lower: Callable[[], Any] | None = None
    program: Callable[[], Any] | None = None

    def losses(self, steps: int) -> list[float]:
        return [self.value(self.step(*batch)) for batch in self.batches[:steps]]

    def rounds(self, channel: Channel, steps: int) -> None:
        stream = itertools.cycle(self.batches)
        while True:
            channel.wait()
            begin = time.perf_counter()
            for batch in itertools.islice(stream, steps):
                loss = self.step(*batch)
            self.wait(loss)
            channel.report(seconds={"step": (time.perf_counter() - begin) / steps})


def jax_loop(step: Callable, state: Any, batches: list[tuple]) -> Loop:
    """A `Loop` over a pure function ``step(state, *batch) -> (state, loss)``, which the caller has jitted."""
    import jax

    held = [state]

    def update(*batch):
        held[0], loss = step(held[0], *batch)
        return loss

    loop = Loop(update, [jax.device_put(batch) for batch in batches], jax.block_until_ready)
    if hasattr(step, "lower"):
        loop.lower = lambda: step.lower(held[0], *loop.batches[0])
        loop.program = lambda: loop.lower().compile()
    return loop


def reader(batches: Iterator[Mapping[str, Any]]) -> Loop:
    """The job of reading images. Its losses are the means of batches, so systems must read the same images."""
    return Loop(
        lambda: next(batches)["image"], [()] * 16, lambda last: last, lambda images: float(np.asarray(images).mean())
    )
