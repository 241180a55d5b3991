"""A race's result as a table, and the goals it meets."""

import statistics

from benchmarks.ratios import Interval, met, noise, outcome, ratio
from benchmarks.suite import Goal, Suite


def table(suite: Suite, found: dict, measure: str) -> list[list[str]]:
    """The table of one measure, header first: time, ratio to the floor with its interval, and goal of each system."""
    rounds = found["rounds"]
    rows = [["system", measure, "of the floor", "95 % interval", "goal"]]
    for system in [s for s in suite.systems if all(measure in r.get(s, ()) for r in rounds)]:
        floor = suite.floor_of(system)
        cost = duration(statistics.median(r[system][measure] for r in rounds))
        if system == floor:
            rows.append([system, cost, "1", "", ""])
            continue
        r = ratio(rounds, system, floor, measure)
        goals = [verdict(suite, found, goal) for goal in suite.goals if measure == (goal.measure or suite.measures[0])
                 and system == (goal.system if goal.against in (None, floor) else goal.against)]  # fmt: skip
        said = "; ".join(filter(None, goals)) if system != f"{suite.systems[0]} again" else "A/A"
        of = "" if floor == suite.systems[0] else f" of {floor}"
        rows.append([system, cost, f"{r.median:.3f}{of}", f"{r.low:.3f} to {r.high:.3f}", said])
    return rows


def verdict(suite: Suite, found: dict, goal: Goal) -> str:
    """The goal in words, and whether it is met; empty if one of its systems did not take part."""
    measure = goal.measure or suite.measures[0]
    rounds = found["rounds"]
    taking_part = [system for system in (goal.system, goal.against) if system is not None]
    if not all(measure in r.get(system, ()) for r in rounds for system in taking_part):
        return ""
    r = outcome(goal, rounds, measure)
    if goal.against is None:
        said = "met" if met(goal, r, 0.0) else "not met"
        return f"{r.median:.2f} s ({r.low:.2f} to {r.high:.2f}), at most {goal.limit:g} s: {said}"
    said = "met" if met(goal, r, noise(suite, rounds, measure)) else "not met"
    if goal.against == suite.floor_of(goal.system):
        return f"at most {goal.limit:g}: {said}"
    limit = "" if goal.limit == 1.0 else f", at most {goal.limit:g}"
    return f"{goal.system} at {_short(r)} of it{limit}: {said}"


def _short(r: Interval) -> str:
    return f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})"


def duration(seconds: float) -> str:
    """Seconds as text, in s or ms.

    >>> duration(0.00025), duration(0.5), duration(12)
    ('0.250 ms', '500 ms', '12.0 s')
    """
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e3:.3f} ms"


def plain(rows: list[list[str]]) -> str:
    """A table in aligned columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(rows: list[list[str]]) -> list[str]:
    """A table as lines of Markdown. All columns but the first and the last are aligned to the right."""
    header, *rest = rows
    head = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
    return head + [f"| {' | '.join(row)} |" for row in rest]


def text(suite: Suite, found: dict) -> str:
    """The result of a race for a terminal: its tables, and the errors of systems that failed."""
    lines = [f"\n{suite.name}: {suite.what}; {len(found['rounds'])} rounds, {found['threads']} thread(s)"]
    lines += [plain(table(suite, found, measure)) for measure in suite.measures]
    lines += [f"  {message}" for message in found["failed"].values()]
    return "\n".join(lines)
