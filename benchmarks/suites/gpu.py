"""`gpt` at a size for GPUs: about 350 million parameters, stored in float32 and computed in bfloat16.

`benchmarks/gpu.py` runs it. Each measurement is a new process with the GPU to itself, since a process takes most of the
GPU's memory.
"""

import statistics

from benchmarks.suite import AGAIN, FLOOR, OURS, Goal, Suite
from benchmarks.suites import gpt

SIZES = {
    "350m": {"layers": 24, "width": 1024, "heads": 16, "tokens": 1024, "vocabulary": 24_576, "rate": 2e-4},
    "tiny": {"layers": 2, "width": 64, "heads": 2, "tokens": 128, "vocabulary": 256, "rate": 1e-3},
}
BATCHES = {"350m": (16, 1, 2, 4, 8, 32, 64), "tiny": (4,)}
"""The possible batch sizes in sequences, the default first. 16 is for a GPU of 80 GB, 4 for 24 GB."""

WARM, ROWS = 2, 5
"""The numbers of warm-up rows and of timed rows in a process. The first row of `fit` compiles."""


class Enough(Exception):
    """All rows of a process have run."""


class Rows:
    """The `Channel` of a process without a parent to wait for: it starts rounds itself and stops after the last."""

    def __init__(self):
        self.seconds: list[float] = []

    def wait(self) -> None:
        if len(self.seconds) == WARM + ROWS:
            raise Enough

    def report(self, *, seconds: dict[str, float]) -> None:
        self.seconds.append(seconds["step"])


def steps(work):
    """The first losses, and the seconds of a step: the median over timed rows."""
    from benchmarks.systems import build

    job, rows = build(work), Rows()
    losses = job.losses(10)
    try:
        job.rounds(rows, work.suite.steps)
    except Enough:
        return {"losses": losses, "seconds": {"step": statistics.median(rows.seconds[WARM:])}}


def made(size: str, batch: int) -> Suite:
    """The race of a model size with ``batch`` sequences in a batch."""
    c = {**SIZES[size], "batch": batch, "compute": "bfloat16"}
    return Suite(
        f"gpu-{size}-{batch}",
        f"bfloat16: {c['layers']} layers, d {c['width']}, {c['heads']} heads, {batch} x {c['tokens']:,} tokens, "
        f"vocabulary {c['vocabulary']:,}, Adam",
        systems=(FLOOR, AGAIN, *OURS, "torch-compile"),
        model="gpt",
        config=c,
        weights=gpt.weights,
        data=gpt.data,
        batch_size=batch,
        epoch=64,
        steps={"350m": 10, "tiny": 2}[size],
        rounds={"350m": 5, "tiny": 1}[size],
        tolerance=5e-3,
        once=steps,
        goals=(Goal("sapwood", FLOOR, 1.02), Goal("sapwood", "torch-compile", round(1 / 1.1, 3))),
    )


SUITES = tuple(made(size, batch) for size in SIZES for batch in BATCHES[size])
