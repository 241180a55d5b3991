"""The page of the results: docs/benchmarks.md between its markers, and its chart, from the JSON that was measured."""

import json
from pathlib import Path

from benchmarks.chart import draw
from benchmarks.report import table
from benchmarks.suite import NAMES, suites
from benchmarks.work import ROOT

BEGIN, END = "<!-- measured: written by `python -m benchmarks --page` -->", "<!-- end of measured -->"


def write(results: Path, docs: Path = ROOT / "docs") -> None:
    """Fill in the page and draw its chart from the files in ``results``."""
    page = docs / "benchmarks.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    races, lines = [], []
    for name in NAMES:
        file = results / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        measured = {race["name"]: race for race in found["races"]}
        for suite in suites(name):
            if suite.name in measured:
                races.append((suite, measured[suite.name]))
                lines += section(suite, measured[suite.name], found["machine"])
    draw(races, docs / "benchmarks.svg")
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")


def section(suite, race: dict, machine: dict) -> list[str]:
    """A race in Markdown."""
    lines = [f"### {suite.name}", "", f"{suite.what[0].upper()}{suite.what[1:]}.", ""]
    for measure in suite.measures:
        header, *rows = table(suite, race, measure)
        lines += [f"| {' | '.join(header)} |", "|---|" + "---:|" * 3 + "---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "sapwood")
    where = f"{race['threads']} thread(s) of {machine['cpu']}, Python {machine['python']}"
    return [*lines, f"{len(race['rounds'])} rounds on {machine['date'][:10]}, {where}, {versions}.", ""]
