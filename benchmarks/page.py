"""Write the results in docs/benchmarks.md, between its markers, and its charts, from the JSON of measurements."""

import json
from pathlib import Path

from benchmarks import growth, memory
from benchmarks.chart import draw
from benchmarks.report import markdown, table
from benchmarks.suite import NAMES, suites
from benchmarks.work import ROOT

BEGIN, END = "<!-- measured: written by `python -m benchmarks --page` -->", "<!-- end of measured -->"

STUDIES = {"memory": memory, "growth": growth}
"""Studies that are measured without peers."""


def write(results: Path, docs: Path = ROOT / "docs") -> None:
    """Write the page and draw its charts from the files in ``results``."""
    page = docs / "benchmarks.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    races, lines = [], []
    for suite in [suite for name in NAMES for suite in suites(name)]:
        file = results / f"{suite.name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            races.append((suite, found["race"]))
            lines += section(suite, found["race"], found["machine"])
    for name in STUDIES:
        if (results / f"{name}.json").exists():
            lines += study(name, json.loads((results / f"{name}.json").read_text()), docs)
    draw(races, docs / "benchmarks.svg")
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")


def section(suite, race: dict, machine: dict) -> list[str]:
    """The section of a race, as lines of Markdown."""
    lines = [f"### {suite.name}", "", f"{suite.what[0].upper()}{suite.what[1:]}.", ""]
    for measure in suite.measures:
        lines += [*markdown(table(suite, race, measure)), ""]
    return [*lines, f"{len(race['rounds'])} rounds, {race['threads']} thread(s), {where(machine)}.", ""]


def study(name: str, found: dict, docs: Path) -> list[str]:
    """The section of a study as lines of Markdown. Its chart is drawn into the folder of the page."""
    module = STUDIES[name]
    module.draw(found["found"], docs / f"{name}.svg")
    lines = [f"### {name}", "", (module.__doc__ or "").partition("\n")[0], "", f"![{name}]({name}.svg)", ""]
    for rows in module.tables(found["found"]):
        lines += [*markdown(rows), ""]
    return [*lines, f"{where(found['machine'])}.", ""]


def where(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name != "sapwood")
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['date'][:10]}, Python {machine['python']}, {versions}"
    )
