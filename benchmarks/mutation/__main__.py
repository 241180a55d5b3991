"""Mutation testing: how many small faults in Sapwood's source the tests detect.

    python -m benchmarks.mutation draw               # 120 faults, drawn by a seed -> mutants.json
    python -m benchmarks.mutation reach -- -n 2      # run the tests once: which reach each fault, how long they take
    python -m benchmarks.mutation run results.json   # run each fault against the tests that reach it

`draw` takes the same number of faults from each room. `reach` runs `pytest -m ""` with the options after `--`. `run`
runs each fault against the fastest tests that reach it, those of its own room first, up to `SECONDS` of tests. It stops
at a fault's first failure.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.mutation import mutate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MUTANTS = HERE / "mutants.json"
ROOMS = ("core", "layers", "parallel", "data", "train")
SEED, A_ROOM = 14, 24
SECONDS, AT_MOST = 25, 60  # of tests chosen for a fault; of the run after which it is stopped


def draw() -> None:
    numbers = random.Random(SEED)
    chosen = []
    for room in ROOMS:
        found = []
        for path in sorted((ROOT / room).rglob("*.py")):
            found += mutate.sites(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        chosen += sorted(numbers.sample(found, A_ROOM), key=lambda site: (site.file, site.line))
    lines = ",\n".join(json.dumps(dataclasses.asdict(site)) for site in chosen)
    MUTANTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "MUTATION_LIST": str(MUTANTS), **more}


def reach(directory: Path, arguments: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in (*directory.glob("*.txt"), *directory.glob("*.xml")):  # of an earlier list or other tests
        path.unlink()
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", *arguments]
    command += [
        f"--junitxml={directory / 'tests.xml'}",
        "-o",
        "junit_family=xunit1",
        "-o",
        "junit_duration_report=total",
    ]
    subprocess.run(command, cwd=ROOT, env=environment(MUTATION_REACHED=str(directory)))


def _listed() -> list[mutate.Site]:
    return [mutate.Site(**x) for x in json.loads(MUTANTS.read_text(encoding="utf-8"))]


def _reached(directory: Path) -> dict[int, set[str]]:
    reached = collections.defaultdict(set)
    for path in directory.glob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            number, test = line.split(" ", 1)
            reached[int(number)].add(test)
    return reached


def _durations(directory: Path) -> dict[tuple[str, str], float]:
    """The seconds of each test by file and name, without tests that failed or were skipped."""
    import xml.etree.ElementTree as xml

    found = {}
    for path in directory.glob("*.xml"):
        for case in xml.parse(path).iter("testcase"):
            if not {"failure", "error", "skipped"} & {child.tag for child in case}:
                found[case.attrib["file"], case.attrib["name"]] = float(case.attrib["time"])
    return found


def _chosen(site: mutate.Site, tests: set[str], durations) -> list[str]:
    room = f"tests/{site.file.split('/')[0]}/"
    timed = []
    for test in tests:
        file, _, name = test.partition("::")
        plain, bracket, parameters = name.partition("[")
        seconds = durations.get((file, plain.rpartition("::")[2] + bracket + parameters))
        if seconds is not None:
            timed.append((not file.startswith(room), seconds, test))
    chosen, spent = [], 0.0
    for _, seconds, test in sorted(timed):
        if spent + seconds <= SECONDS or not chosen:
            chosen.append(test)
            spent += seconds
    return chosen


def _applies(site: mutate.Site) -> bool:
    """True if the fault can still be made in the file. One that cannot be made would count as detected."""
    try:
        mutate.mutated((ROOT / site.file).read_text(encoding="utf-8"), site)
    except (LookupError, OSError):
        return False
    return True


def _outcome(number: int, tests: list[str], log: Path) -> str:
    """Run tests with a fault: "killed" (detected), "survived", "timeout" (after `AT_MOST` seconds), "no test" or
    "broken" (pytest itself failed)."""
    command = [sys.executable, "-m", "pytest", *tests, "-x", "-q", "-m", "", "-p", "no:cacheprovider", "-n", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(MUTATION_NUMBER=str(number)), stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            code = process.wait(AT_MOST)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what the tests started ends with them
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {0: "survived", 1: "killed", 5: "no test"}.get(code, "broken")  # such as a test that is no longer there


def run(directory: Path, out: Path, at_once: int, only: list[int]) -> None:
    listed = _listed()
    reached, durations = _reached(directory), _durations(directory)
    (directory / "logs").mkdir(exist_ok=True)

    def judge(number: int) -> dict:
        site, began = listed[number], time.monotonic()
        tests = _chosen(site, reached[number], durations)
        if not _applies(site):
            outcome = "gone"
        else:
            outcome = _outcome(number, tests, directory / "logs" / f"{number}.log") if tests else "unreached"
        print(f"{outcome:9} {site.file}:{site.line} {site.before}  ->  {site.after}", flush=True)
        seconds = round(time.monotonic() - began, 1)
        return {
            "number": number,
            **dataclasses.asdict(site),
            "outcome": outcome,
            "tests": len(tests),
            "seconds": seconds,
        }

    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(judge, only or range(len(listed))))
    counts = collections.Counter(x["outcome"] for x in found)
    lines = ",\n".join(map(json.dumps, found))
    out.write_text(f'{{"counts": {json.dumps(counts)}, "mutants": [\n{lines}\n]}}\n', encoding="utf-8")
    print(dict(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "reach", "run"])
    parser.add_argument("out", nargs="?", type=Path, help="run: the file of the results")
    parser.add_argument("--reached", type=Path, default=Path("/tmp/reached"), help="where `reach` keeps what it found")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="run: these faults, counted from 0")
    parser.add_argument("-j", type=int, default=2, help="faults at once")
    options, rest = parser.parse_known_args()
    if rest and options.what != "reach":
        parser.error(f"{options.what} does not know {' '.join(rest)}")
    match options.what:
        case "draw":
            draw()
        case "reach":
            reach(options.reached, [x for x in rest if x != "--"])
        case "run":
            if options.out is None or not options.out.absolute().parent.is_dir():
                parser.error("run: the file of the results is expected, in a folder that is there")
            if not any(options.reached.glob("*.xml")):
                parser.error(f"run: {options.reached} has no tests; `reach` first")
            if options.only and not all(0 <= number < len(_listed()) for number in options.only):
                parser.error(f"run: --only takes numbers from 0 to {len(_listed()) - 1}")
            run(options.reached, options.out, options.j, options.only)


if __name__ == "__main__":
    main()
