"""Damage files of a run, of its compiled programs and of its data, one at a time, and check what its uses give.

    python -m benchmarks.damage [--cases 300] [--seed 0]

Trains `digits-mlp` to its end, and a second run until it is killed half-way. Each case takes a fresh copy and damages
one file in one way: a flipped bit, truncation, deletion, another file of its folder in its place, or a block of zeros.
It then loads and evaluates the finished run, or resumes the killed one with no program in memory. The results are
compared with those of the undamaged run:

    right      the same numbers, under the right step; numbers of another undamaged checkpoint, or other rows of
               metrics, only with a warning
    refused    one line and exit code 2, and there is no undamaged copy of the content
    silent     other numbers, or a wrong step, without a warning
    gave up    an error, although there is an undamaged copy
    traceback  a traceback on stderr, or an exception that is not Sapwood's
    crash      the process ended

Prints the table and writes `benchmarks/results/damage.json`. The exit code is 1 if any result is other than right or
refused.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import kill

COMMAND = ["digits-mlp", "--epochs", "4", "--hidden", "16", "--checkpoint-every", "15", "--keep", "3"]
BEST = ["--best", "max:accuracy"]
WAYS = ("bit", "truncation", "deletion", "duplication", "zeros")
BAD = ("silent", "gave up", "traceback", "crash")


def damaged(file: Path, way: str, draw: random.Random) -> str:
    """Damage a file; returns a description of the damage."""
    data = bytearray(file.read_bytes())
    if way == "deletion":
        file.unlink()
        return "removed"
    if way == "duplication":
        others = sorted(x for x in file.parent.iterdir() if x.is_file() and x.name != file.name)
        if not others:
            file.write_bytes(bytes(data + data))
            return "twice itself"
        other = draw.choice(others)
        file.write_bytes(other.read_bytes())
        return f"replaced by {other.name}"
    at = draw.randrange(max(len(data), 1))
    if way == "truncation":
        file.write_bytes(bytes(data[:at]))
        return f"cut to {at} of {len(data)} bytes"
    if way == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
        file.write_bytes(bytes(data))
        return f"zeros from byte {at}"
    if data:
        data[at] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(data))
    return f"a bit of byte {at}"


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Capture stdout and stderr at the level of file descriptors. The list holds both texts after the block."""
    texts: list[str] = []
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
            texts += [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]


def command(*words: str) -> tuple[int, str, str]:
    """Run a command of Sapwood in this process; returns its exit code, stdout and stderr."""
    from sapwood.__main__ import main

    with captured() as texts:
        try:
            code = main(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            code = -1
            traceback.print_exc()
    return code, *texts


def loaded(path: Path) -> dict[str, Any]:
    """The result of `sw.load`: step, digest of the parameters and classes, or its error; and warnings and stderr."""
    import sapwood as sw
    from sapwood.saving.digest import tree_digest

    with captured() as texts, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            model = sw.load(path)
            found = {"step": model.extra["step"], "digest": tree_digest(model.params), "classes": model.classes}
        except sw.SapwoodError as error:
            found = {"refused": str(error)}
        except BaseException:
            traceback.print_exc()
            found = {"refused": "not by Sapwood"}
    return {**found, "warned": [str(x.message) for x in seen], "err": texts[1]}


def rows(run: Path) -> list[dict]:
    return [] if not (run / "metrics.jsonl").exists() else kill.Place(run.parent, (), run).rows()


def uses(root: Path, group: str) -> dict[str, Any]:
    """The result of each use of a group of files ("run", "killed", "cache" or "data")."""
    import jax

    jax.clear_caches()
    os.environ.update(SAPWOOD_DATA_DIR=str(root / "data"), SAPWOOD_CACHE=str(root / "cache"))
    found: dict[str, Any] = {}
    if group == "run":
        found["load"], found["checkpoints"] = loaded(root / "run"), loaded(root / "run" / "checkpoints")
    if group in ("run", "data"):
        found["evaluate"] = command("evaluate", str(root / "run"))
    if group != "run":
        found["resume"] = command("train", *COMMAND, "--run", str(root / "killed"), "--resume")
        with contextlib.suppress(Exception):
            found["rows"] = rows(root / "killed")
    return found


def verdicts(found: dict[str, Any], whole: dict[str, Any], truth: dict[int, str], copies: set[str]) -> dict[str, str]:
    """The verdict on each use, as the head of this file lists them.

    Args:
        found: the results of `uses` with the damage.
        whole: the results without damage.
        truth: the digest of the parameters of each checkpoint, by step.
        copies: the uses that have an undamaged copy of the damaged file's content.
    """
    said = {}
    for use in ("load", "checkpoints"):
        if (one := found.get(use)) is None:
            continue
        step = one.get("step")
        if "Traceback" in one["err"] or one.get("refused") == "not by Sapwood":
            said[use] = "traceback"
        elif "refused" in one:
            said[use] = "gave up" if use in copies else "refused"
        else:
            other = any(one[name] != whole[use][name] for name in ("step", "classes"))
            said[use] = "silent" if one["digest"] != truth.get(step) or (other and not one["warned"]) else "right"
    for use in ("evaluate", "resume"):
        if use not in found:
            continue
        code, out, err = found[use]
        same = numbers(out) == numbers(whole[use][1])
        other = "is damaged" in err and numbers(out) in whole.get("steps", [])
        if "Traceback" in err or code < 0:
            said[use] = "traceback"
        elif code:
            one_line = sum(line.startswith("sapwood: error") for line in err.splitlines()) == 1
            said[use] = "traceback" if not one_line else "gave up" if use in copies else "refused"
        else:
            said[use] = "right" if same or (use == "evaluate" and other) else "silent"
    if said.get("resume") == "right" and found.get("rows") != whole["rows"]:
        said["resume"] = "right" if "does not hold the rows" in found["resume"][2] else "silent"
    return said


def numbers(out: str) -> list[str]:
    """The results of a command: the last two lines that it prints."""
    return out.splitlines()[-2:]


def prepared(root: Path) -> None:
    """Make the finished run, the run killed half-way, and the data and programs of both."""
    for name, more in (("run", BEST), ("killed", ())):
        at = kill.Place(root, ("train", *COMMAND, *more, "--run", name), root / name)
        half = (lambda at=at: (at.run / "checkpoints" / "00000120").exists()) if name == "killed" else None
        done = at.start(kill=half)
        if done.code not in (0, -9):
            sys.exit(done.err)


def copies_of(file: Path, group: str) -> set[str]:
    """The uses that have an undamaged copy of the content of a file of this group."""
    parts = set(file.parts)
    if group == "cache":
        return {"resume"}
    if {"checkpoints", "model"} & parts:
        return {"load", "checkpoints", "evaluate", "resume"}
    if group == "data":  # scikit-learn's
        return {"evaluate", "resume"}
    return {"load", "checkpoints"} if group == "run" else set()


def worker(pristine: Path) -> None:
    """Read cases from stdin, one JSON line each, and answer each with the results of its uses."""
    from sapwood.train.record import curves

    nothing = subprocess.Popen([sys.executable, "-c", ""], stderr=subprocess.PIPE)
    curves.start = lambda *_: nothing  # drawing takes longer than all else, and reads nothing that is checked
    real = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryDirectory() as directory:
        for line in sys.stdin:
            case = json.loads(line)
            root = Path(directory) / "case"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(pristine, root)
            what = ""
            if case["file"]:
                what = damaged(root / case["file"], case["way"], random.Random(case["seed"]))
            answer = {"what": what, **uses(root, case["group"])}
            if not case["file"]:  # what each checkpoint of the whole run evaluates to
                steps = (str(int(x.name)) for x in (root / "run" / "checkpoints").iterdir())
                answer["steps"] = [numbers(command("evaluate", str(root / "run"), "--step", n)[1]) for n in steps]
            real.write(json.dumps(answer) + "\n")
            real.flush()


class Worker:
    """The process that runs the cases. A new one is started after a crash."""

    def __init__(self, pristine: Path):
        self.words = [sys.executable, "-m", "benchmarks.damage", "--worker", str(pristine)]
        self.process: Any = None

    def ask(self, case: dict[str, Any]) -> dict[str, Any] | None:
        if self.process is None:
            self.process = subprocess.Popen(self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process = None
            return None
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return worker(options.worker)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        root = Path(directory)
        prepared(root)
        groups = {
            "run": root / "run", "killed": root / "killed", "cache": root / "cache", "data": root / "data",
        }  # fmt: skip
        files = {name: sorted(x for x in where.rglob("*") if x.is_file()) for name, where in groups.items()}
        asked = Worker(root)
        whole = {name: asked.ask({"file": None, "group": name}) or sys.exit("no answer") for name in groups}
        truth = known(root / "run")
        count, bad = collections.Counter(), []
        for number in range(options.cases):
            print(f"case {number}", end="\r", flush=True)
            group = list(groups)[number % len(groups)]
            case = {"file": str(draw.choice(files[group]).relative_to(root)), "group": group,
                    "way": WAYS[number // len(groups) % len(WAYS)], "seed": draw.random()}  # fmt: skip
            found = asked.ask(case)
            copies = copies_of(Path(case["file"]), group)
            said = {"all": "crash"} if found is None else verdicts(found, whole[group], truth, copies)
            for use, word in said.items():
                count[group, use, word] += 1
            if set(said.values()) - {"right", "refused"}:
                bad.append({**case, "what": (found or {}).get("what"), "said": said})
                print(
                    json.dumps(bad[-1]), *(str((found or {}).get(use))[-900:] for use in said), sep="\n  ", flush=True
                )
    table = [{"files": g, "use": use, "result": word, "cases": n} for (g, use, word), n in sorted(count.items())]
    print(*table, sep="\n")
    result = {"cases": options.cases, "seed": options.seed, "table": table, "bad": bad}
    (Path(__file__).parent / "results" / "damage.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(word in BAD for _, _, word in count))


def known(run: Path) -> dict[int, str]:
    """The digest of the parameters of each checkpoint of the undamaged run, by step."""
    import sapwood as sw
    from sapwood.saving.checkpoints import Checkpoints
    from sapwood.saving.digest import tree_digest

    steps = Checkpoints(run / "checkpoints").steps()
    return {step: tree_digest(sw.load(run / "checkpoints", step=step).params) for step in steps}


if __name__ == "__main__":
    main()
