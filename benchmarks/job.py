"""What a system hands to the worker: how to report its first losses, and how to run rounds when told to."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Channel(Protocol):
    """The line to the parent."""

    def wait(self) -> None:
        """Return when the parent says go; the process ends where the parent is done."""

    def report(self, **message: Any) -> None:
        """Answer the parent."""


class Job(Protocol):
    def losses(self, steps: int) -> list[float]:
        """The losses of the first steps from the first weights."""

    def rounds(self, channel: Channel, steps: int) -> None:
        """For ever: wait, run so many steps, report their seconds."""


@dataclass
class Loop:
    """The loop of a library without one: ``step(*batch)`` updates and gives the loss, ``wait(loss)`` blocks on it.

    The batches are on the device already, and are cycled through. Where there is one program, ``lower()`` lowers it and
    ``program()`` is what runs.
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
    """A `Loop` over a pure ``step(state, *batch) -> (state, loss)``, jitted by the caller."""
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
    """The job of reading images: its losses are the means of the first batches, so that all must read the same."""
    return Loop(
        lambda: next(batches)["image"], [()] * 16, lambda last: last, lambda images: float(np.asarray(images).mean())
    )
