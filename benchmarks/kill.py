"""Kill `sapwood train` at random moments, resume it, and compare the result with an uninterrupted run.

    python benchmarks/kill.py [--moments 10] [--seed 0] [RECIPE [its options]]

Moments are drawn uniformly from the whole time of the command. Every command begins with an empty data directory and no
compiled programs, so its time includes importing, preparing the data, the first compilation, writing checkpoints, the
final evaluation and drawing. A moment is a fraction of that time. If the command, whose time varies, ends before it is
killed, the same fraction of the shorter time is tried. Prints a table of the moments, what the command was doing, and
the digests. The exit code is 1 unless all digests and rows of metrics are equal.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """A finished process: its exit code (negative for a signal), its seconds, its stdout and its stderr."""

    code: int
    seconds: float
    out: str
    err: str

    @property
    def digest(self) -> str:
        """The digest in the last line of stdout; without one, the end of stderr."""
        last = self.out.splitlines()[-1:]
        return last[0].removeprefix("digest ") if last and last[0].startswith("digest ") else f"none: {self.err[-300:]}"


@dataclass(frozen=True)
class Place:
    """The directory of one experiment: the working directory of its command, its data, its cache and its run."""

    root: Path
    command: tuple[str, ...]
    run: Path

    def start(
        self, *more: str, kill: float | Callable[[], bool] | None = None, by: signal.Signals = signal.SIGKILL
    ) -> Run:
        """Run the command, and send it the signal ``by`` after ``kill`` seconds or as soon as ``kill()`` is True."""
        self.root.mkdir(parents=True, exist_ok=True)
        own = {"SAPWOOD_DATA_DIR": str(self.root / "data"), "SAPWOOD_CACHE": str(self.root / "cache")}
        environment = {**os.environ, **own, "PYTHONUNBUFFERED": "1"}
        words = [sys.executable, "-m", "sapwood", *self.command, *more]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            begun = time.perf_counter()
            process = subprocess.Popen(words, cwd=self.root, env=environment, stdout=out, stderr=err)
            while process.poll() is None:
                now = time.perf_counter() - begun
                if kill is not None and (kill() if callable(kill) else now >= kill):
                    process.send_signal(by)
                    process.wait()
                    break
                time.sleep(0.002)
            seconds = time.perf_counter() - begun
            texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        return Run(process.returncode, seconds, *texts)

    def rows(self) -> list[dict]:
        """The rows of ``metrics.jsonl`` without the fields that differ between runs: speed and run id."""
        varies = ("steps_per_second", "run")
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [{name: x for name, x in json.loads(line).items() if name not in varies} for line in lines]

    def doing(self) -> str:
        """What a killed command was doing, judged by the files that it left."""
        names = [path.name for path in (self.run / "checkpoints").glob("*")]
        whole = [name for name in names if name.isdigit()]
        if (self.run / "model").exists() or (self.run / "curves.png").exists():
            return "ending"
        if any("tmp" in name for name in names):
            return f"writing checkpoint {len(whole) + 1}"
        if whole:
            return f"after checkpoint {int(max(whole))}"
        if (self.run / "metrics.jsonl").exists():
            return "training"
        if (self.run / "config.json").exists():
            return "starting (compiling)"
        if any((self.root / "data").glob("*/incomplete.*")):
            return "preparing data"
        return "preparing, or importing" if (self.root / "data").exists() else "importing"


def place(root: Path, command: Sequence[str], run: str | None = "run") -> Place:
    """The `Place` of ``train *command``. With ``run=None`` the command chooses its first run directory."""
    where = ("--run", run) if run is not None else ()
    chosen = run or f"runs/{Path(command[0]).stem}-001"
    return Place(root, ("train", *command, *where), root / chosen)


def killed(root: Path, command: Sequence[str], fraction: float, seconds: float) -> tuple[Place, Run]:
    """Run a command and kill it at a fraction of its time; returns its place and the killed run.

    ``seconds`` is the time of a whole run. The time varies: a command that ends before it is killed is tried again with
    the same fraction of its own time, up to five times.
    """
    for attempt in range(5):
        at = place(root / str(attempt), command)
        run = at.start(kill=fraction * seconds)
        if run.code == -signal.SIGKILL:
            return at, run
        if run.code:
            sys.exit(f"the command failed: {run.err}")
        seconds = run.seconds
    sys.exit(f"the command ended five times before {fraction:.0%} of its time had gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, command = parser.parse_known_args()
    command = command or ["digits"]
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        root = Path(directory)
        whole = place(root / "unbroken", command)
        unbroken = whole.start()
        if unbroken.code:
            sys.exit(f"the command failed: {unbroken.err}")
        print(f"unbroken  {unbroken.seconds:6.2f} s{'':38} {unbroken.digest}", flush=True)
        equal = 0
        for i in range(options.moments):
            fraction = draw.random()
            at, run = killed(root / str(i), command, fraction, unbroken.seconds)
            doing = at.doing()
            resumed = at.start("--resume")
            same = resumed.digest == unbroken.digest and at.rows() == whole.rows()
            equal += same
            print(f"{fraction:8.3f}  {run.seconds:6.2f} s  {doing:34} {'  ' if same else '!='} {resumed.digest}",
                  flush=True)  # fmt: skip
    print(f"{equal} of {options.moments} end with the digest and the metrics of the unbroken run")
    sys.exit(equal != options.moments)


if __name__ == "__main__":
    main()
