"""The peak memory of a training step, beside that of the hand-written floor, and what `remat` saves of it.

The bytes are those of the compiled program: arguments, outputs and temporaries, less the bytes that outputs share with
donated arguments. The page of the results shows the first line of this text.
"""

import dataclasses
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.suite import suites
from benchmarks.systems import build
from benchmarks.work import Work, prepare

RACES = ("mlp", "conv", "gpt")
POLICIES = ("everything_saveable", "dots_saveable", "minimal", "full")


def peak(compiled) -> int:
    """The bytes of a compiled step at its peak."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def measure(rounds: int, tell) -> dict:
    """The peak bytes by suite and system, and the bytes and seconds of scanned `gpt` by remat policy."""
    found: dict = {"peaks": {}, "remat": []}
    for name in RACES:
        found["peaks"][name] = {}
        for system in ("floor", "sapwood-step"):
            job = _job(name, system)
            found["peaks"][name][system] = peak(job.program())
            tell(f"memory: {name}, {system}")
    jobs = {policy: _job("gpt", "sapwood-step-scan", remat=policy) for policy in POLICIES}
    bytes_ = {policy: peak(job.program()) for policy, job in jobs.items()}
    tell("memory: the remat policies are compiled")
    seconds: dict = {policy: [] for policy in POLICIES}
    for number in range(-1, rounds):
        for policy in random.sample(POLICIES, len(POLICIES)):
            begin = time.perf_counter()
            jobs[policy].wait(jobs[policy].step(*jobs[policy].batches[0]))
            if number >= 0:
                seconds[policy].append(time.perf_counter() - begin)
    found["remat"] = [{"policy": p, "bytes": bytes_[p], "seconds": seconds[p]} for p in POLICIES]
    return found


def _job(name: str, system: str, **config):
    suite = suites(name)[0]
    suite = dataclasses.replace(suite, config={**suite.config, **config}, epoch=1)
    with tempfile.TemporaryDirectory() as directory:
        prepare(suite, Path(directory))
        return build(Work(suite, system, Path(directory)))


def tables(found: dict) -> list[list[list[str]]]:
    """Two tables, header first: the peaks, and the trade-off of remat."""
    peaks = [["suite", "floor", "sapwood", "more, in bytes", "of the floor", "goal, to three digits"]]
    for name, by in found["peaks"].items():
        more, ratio = by["sapwood-step"] - by["floor"], round(by["sapwood-step"] / by["floor"], 3)
        said = "at most 1: met" if ratio <= 1.0 else "at most 1: not met"
        peaks.append([name, size(by["floor"]), size(by["sapwood-step"]), f"{more:+,}", f"{ratio:.3f}", said])
    remat = [["remat of gpt, scanned", "bytes", "step", "bytes of the first", "time of the first"]]
    first = found["remat"][0]
    for row in found["remat"]:
        ratio = statistics.median(b / a for a, b in zip(first["seconds"], row["seconds"], strict=True))
        step = f"{statistics.median(row['seconds']):.2f} s"
        remat.append([row["policy"], size(row["bytes"]), step, f"{row['bytes'] / first['bytes']:.2f}", f"{ratio:.2f}"])
    return [peaks, remat]


def size(count: int) -> str:
    """A number of bytes in MB.

    >>> size(1_250_000)
    '1.2 MB'
    """
    return f"{count / 1e6:.1f} MB"


def draw(found: dict, path: Path) -> None:
    """Draw the trade-off of remat: bytes on the x axis, seconds on the y axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "0"}):
        figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
        for i, row in enumerate(sorted(found["remat"], key=lambda row: row["bytes"])):
            x, ys = row["bytes"] / 1e6, row["seconds"]
            axis.plot([x, x], [min(ys), max(ys)], color="#3f7d4e", linewidth=2.5, alpha=0.4)
            axis.plot([x], [statistics.median(ys)], "o", color="#3f7d4e", markersize=6)
            # Points that are near each other have their names on the right and on the left.
            beside, side = ((-7, -14), "right") if i % 2 else ((7, 6), "left")
            axis.annotate(row["policy"], (x, statistics.median(ys)), beside, textcoords="offset points", ha=side)
        axis.set(xlabel="peak bytes of a training step of gpt (MB)", ylabel="seconds a step", ylim=(0, None))
        axis.set_xlim(0, 1.45 * max(row["bytes"] for row in found["remat"]) / 1e6)
        axis.grid(color="#e4e0d6", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        plt.close(figure)
