"""The parent process of a race: start the systems, check that they do the same work, run the rounds.

A race of steps starts each system once, one after the other, each in a new process. In each round every process then
runs its steps while the others are blocked, in a new random order. A race of fresh processes starts each system again
in each round. All systems have the same number of threads.
"""

import contextlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite import Suite
from benchmarks.systems import NEEDS
from benchmarks.work import ROOT, prepare

WARM = 2
"""The number of warm-up rounds in a race of steps. A race of fresh processes has one warm-up round."""


class Refused(Exception):
    """A race is impossible or invalid; the message is one line."""


class Failed(Exception):
    """The process of a system ended without an answer."""


class Child:
    """The process of one system."""

    def __init__(self, suite: Suite, system: str, directory: Path, threads: int):
        self.system = system
        self.log = directory / f"{suite.name} {system}.log"
        environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        for name in ("OMP", "MKL", "OPENBLAS"):
            environment[f"{name}_NUM_THREADS"] = str(threads)
        flags = environment.pop("XLA_FLAGS", "").split()  # one device, whatever tests simulate
        environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "host_platform_device_count" not in flag)
        words = [sys.executable, "-m", "benchmarks.worker", suite.name, system, str(directory), str(threads)]
        with self.log.open("w") as log:
            self.begun = time.perf_counter()
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )  # fmt: skip

    def ask(self) -> dict:
        """Start the next round, and wait for the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [line for line in self.log.read_text().splitlines() if line.strip()]
            raise Failed(f"{self.system} failed: {said[-1] if said else f'exit code {self.process.returncode}'}")
        return json.loads(line)

    def end(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def available() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(system: str) -> bool:
    return system not in NEEDS or importlib.util.find_spec(NEEDS[system]) is not None


def agree(suite: Suite, losses: dict[str, list[float]]) -> None:
    """Raise `Refused` if a system's first losses differ from the floor's, since it then does other work."""
    floor = losses[suite.systems[0]]
    for system, found in losses.items():
        for step, (a, b) in enumerate(zip(floor, found, strict=True), 1):
            if not abs(a - b) <= suite.tolerance * abs(a):
                raise Refused(
                    f"{suite.name}: {system} does not do the floor's work: the loss of step {step} is {b:.6g}, the "
                    f"floor's {a:.6g} (tolerance {suite.tolerance:g} of it); nothing was timed"
                )


def tell_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def race(suite: Suite, systems: Sequence[str], rounds: int, threads: int, tell=tell_stderr) -> dict:
    """Run a race.

    Args:
        suite: the race.
        systems: the systems that take part; the floor is among them.
        rounds: the number of timed rounds.
        threads: the number of threads of each process, unless the suite sets it.
        tell: receives lines of progress.

    Returns:
        A dict with the name, the threads, the first losses by system, the seconds by round, system and measure, and
        the errors of failed systems.

    Raises:
        Refused: the floor fails, or losses disagree. Another system that fails is reported and left out.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        prepare(suite, directory)
        threads = suite.threads or threads
        hold = _fresh if suite.once is not None else _persistent
        return {"name": suite.name, "threads": threads, **hold(suite, list(systems), rounds, threads, directory, tell)}


def _persistent(suite, systems, rounds, threads, directory, tell) -> dict:
    children: dict[str, Child] = {}
    losses: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    found: list[dict] = []
    try:
        for system in systems:
            children[system] = Child(suite, system, directory, threads)
            with _may_fail(suite, system, failed, children, tell):
                losses[system] = children[system].answer()["losses"]
                tell(f"{suite.name}: {system} is ready, {time.perf_counter() - children[system].begun:.1f} s")
        agree(suite, losses)
        for number in range(-WARM, rounds):
            seconds = {}
            for system in random.sample(list(children), len(children)):
                with _may_fail(suite, system, failed, children, tell):
                    seconds[system] = children[system].ask()["seconds"]
            if number >= 0:
                found.append(seconds)
    finally:
        for child in children.values():
            child.end()
    return {"losses": losses, "rounds": found, "failed": failed}


def _fresh(suite, systems, rounds, threads, directory, tell) -> dict:
    failed: dict[str, str] = {}
    found: list[dict] = []
    left = dict.fromkeys(systems)
    losses: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        seconds = {}
        for system in random.sample(list(left), len(left)):
            child = Child(suite, system, directory, threads)
            try:
                with _may_fail(suite, system, failed, left, tell):
                    answer = child.answer()
                    seconds[system] = {"process": time.perf_counter() - child.begun, **answer["seconds"]}
                    losses[system] = answer.get("losses", [])
            finally:
                child.end()
        agree(suite, losses)
        if number >= 0:
            found.append(seconds)
        tell(f"{suite.name}: round {number + 1} of {rounds}")
    return {"losses": losses, "rounds": found, "failed": failed}


@contextlib.contextmanager
def _may_fail(suite: Suite, system: str, failed: dict, running: dict, tell):
    """Remove a system that fails in the block from the race. Raises `Refused` if it is the floor."""
    try:
        yield
    except Failed as error:
        if system == suite.systems[0]:
            raise Refused(f"{suite.name}: {error}") from None
        failed[system] = str(error)
        tell(f"{suite.name}: {error}")
        child = running.pop(system)
        if child is not None:
            child.end()
