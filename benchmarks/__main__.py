"""The command `python -m benchmarks`: run races and studies from the root of the repository. See docs/benchmarks.md."""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import platform
import sys
from pathlib import Path

from benchmarks import page, report
from benchmarks.race import Refused, available, installed, race, tell_stderr
from benchmarks.suite import FLOOR, NAMES, PEERS, WAITING, Suite, suites

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("sapwood", "jax", "jaxlib", "numpy", "optax", "flax", "dm-haiku", "equinox", "keras", "torch",
            "orbax-checkpoint", "grain")  # fmt: skip


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = f"of {', '.join((*NAMES, *page.STUDIES))}, or a race of a suite (input-images); all by default"
    parser.add_argument("suites", nargs="*", help=names)
    parser.add_argument("--against", help=f"of {','.join((FLOOR, *PEERS))}; all by default. The floor always runs")
    parser.add_argument("--rounds", type=int, help="of each race; its own number by default")
    parser.add_argument("--threads", type=int, default=available(), help="of every process; every core by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON; benchmarks/results by default")
    parser.add_argument("--page", action="store_true", help="measure nothing; write docs/benchmarks.md of the results")
    options = parser.parse_args(words)
    for name in options.suites:
        if name in WAITING:
            refuse(f"{name} waits for {WAITING[name]}")
        if name not in page.STUDIES and not races(name):
            refuse(f"there is no suite {name!r}; there are {', '.join((*NAMES, *page.STUDIES))}")
    options.against = PEERS if options.against is None else tuple(options.against.split(","))
    for system in options.against:
        if system not in (FLOOR, *PEERS):
            refuse(f"there is no system {system!r}; there are {', '.join((FLOOR, *PEERS))}")
    if (options.rounds is not None and options.rounds < 1) or not 1 <= options.threads <= available():
        refuse(f"at least one round, and 1 to {available()} threads are expected")
    return options


def takes_part(system: str, against) -> bool:
    """True if a system takes part. A peer takes part only if it was asked for; "linen" includes "linen-scan"."""
    return not system.startswith(PEERS) or system in against or system.removesuffix("-scan") in against


def refuse(message: str, code: int = 2):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def machine() -> dict:
    """The machine, the date and the versions of packages that a result is stored with."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return {"date": date, "cpu": cpu, "cores": available(), "python": platform.python_version(), "versions": versions}


def main(words=None) -> int:
    options = arguments(words)
    if options.page:
        page.write(RESULTS)
        return 0
    missing = sorted({system for system in options.against if not installed(system)})
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (the extra `peers` has them)", file=sys.stderr)
    failed = False
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.suites or (*NAMES, *page.STUDIES):
        if name in page.STUDIES:
            keep(options.out, name, found=study(name, options))
        for suite in races(name):
            try:
                measured = hold(suite, options)
            except Refused as error:
                refuse(str(error), 1)
            failed = failed or bool(measured["failed"])
            keep(options.out, suite.name, race=measured)
    return int(failed)


def races(name: str) -> tuple[Suite, ...]:
    """The races of the suite of this name, or the one race of this name."""
    return tuple(suite for known in NAMES for suite in suites(known) if name in (known, suite.name))


def hold(suite: Suite, options: argparse.Namespace) -> dict:
    """Run a race among the systems that were asked for and are installed, and print it."""
    systems = [system for system in suite.systems if takes_part(system, options.against) and installed(system)]
    measured = race(suite, systems, options.rounds or suite.rounds, options.threads)
    print(report.text(suite, measured), flush=True)
    return measured


def keep(out: Path, name: str, **measured: dict) -> None:
    """Write a result and its machine to `NAME.json`."""
    (out / f"{name}.json").write_text(json.dumps({"machine": machine(), **measured}, indent=1) + "\n")


def study(name: str, options: argparse.Namespace) -> dict:
    """Run the study of memory or growth in a new process, and print it."""
    module = page.STUDIES[name]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(module.measure, (options.rounds or 5, tell_stderr))
    print(f"\n{name}", *map(report.plain, module.tables(found)), sep="\n", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
