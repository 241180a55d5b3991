"""A profile as text: a tree of layer paths with the time of each, the slowest first.

`lines`, `cells`, `notes` and `total` are the parts of the table; the HTML page uses them too.
"""

import dataclasses
from collections import Counter
from typing import Any

from sapwood.core.errors import ConfigError

WIDTH = 100
ITSELF = "(itself)"
_NAME = 44  # the largest number of characters of a name with its indent


def lines(profile: Any, levels: int | None = None) -> list[Any]:
    """The rows of a table: those whose paths have at most ``levels`` names, or all for None.

    A row with rows below it is followed by a row "(itself)" with its own time, if that is at least 0.05 % of the step.
    """
    found = []
    for row in profile.rows:
        if levels is not None and len(row.path) > levels:
            continue
        found.append(row)
        below = [r for r in profile.rows if len(r.path) == len(row.path) + 1 and r.path[:-1] == row.path]
        if below and len(row.path) != levels and row.own >= 5e-4 * profile.seconds:
            found.append(_itself(row, below))
    return found


def _itself(row: Any, below: list[Any]) -> Any:
    """The "(itself)" row of ``row``: its time without the rows ``below`` it."""
    kinds = Counter(row.kinds)
    for other in below:
        kinds.subtract(other.kinds)
    return dataclasses.replace(
        row,
        path=(*row.path, ITSELF),
        seconds=row.own,
        forward=row.forward - sum(r.forward for r in below),
        backward=row.backward - sum(r.backward for r in below),
        kinds=dict(kinds.most_common()),
    )


def cells(row: Any, whole: float) -> list[str]:
    """The texts of a row in the columns after its name. ``whole`` is the time of the step in seconds."""
    passes = [ms(row.forward), ms(row.backward)] if row.forward + row.backward > 0 else ["", ""]
    return [ms(row.seconds), percent(row.seconds / whole), *passes, mostly(row)]


def mostly(row: Any) -> str:
    """The kind of operation that takes most of a row's time, and its share of it."""
    kind, seconds = next(iter(row.kinds.items()))
    return f"{_shorten(kind, 16)} {100 * seconds / row.seconds:.0f}%" if kind and row.seconds else ""


def notes(profile: Any) -> list[str]:
    """Lines above the table that explain its figures."""
    several = f", the mean of {profile.devices} devices" if profile.devices > 1 else ""
    first = f"wall time per step{several}; a moment in which several operations run is shared among them"
    if profile.concurrency > 1.05:
        first += f" ({profile.concurrency:.1f} at once)"
    found = [first]
    if profile.shared >= 5e-4:
        found.append(f"{percent(profile.shared)} of it is in fused operations of several rows, counted to one of them")
    slower = profile.seconds / profile.untraced - 1
    found.append(f"without the profiler a step takes {ms(profile.untraced)} ms ({100 * slower:+.0f}% with it)")
    return found


def table(profile: Any, levels: int | None = None) -> str:
    """The table as text; see `Profile.table`."""
    if levels is not None and levels < 1:
        raise ConfigError(f"profile: a table has at least 1 level of paths, or None for all, got {levels}")
    shown = lines(profile, levels)
    names = ["  " * (len(row.path) - 1) + row.path[-1] for row in shown]
    width = min(_NAME, max(12, *map(len, names)))
    text = [_line("layer", width, ["ms/step", "share", "forward", "backward", "mostly"])]
    text += [_line(name, width, cells(row, profile.seconds)) for name, row in zip(names, shown, strict=True)]
    text.append(_line("total", width, total(profile)))
    return "\n".join([*notes(profile), "", *text])


def total(profile: Any) -> list[str]:
    """The texts of the last row: the time of the step, its share, forward, backward, and where it ran."""
    top = [row for row in profile.rows if len(row.path) == 1]
    forward, backward = sum(row.forward for row in top), sum(row.backward for row in top)
    return [ms(profile.seconds), percent(1.0), ms(forward), ms(backward), f"{profile.device}, {profile.steps} steps"]


def _line(name: str, width: int, columns: list[str]) -> str:
    seconds, share, forward, backward, last = columns
    line = f"{_shorten(name, width):{width}}  {seconds:>9}  {share:>6}  {forward:>9}  {backward:>9}  {last}"
    return _shorten(line.rstrip(), WIDTH)


def ms(seconds: float) -> str:
    """Seconds as milliseconds with three decimals.

    >>> ms(0.0000123), ms(1.23)
    ('0.012', '1230.000')
    """
    return f"{1e3 * seconds:.3f}"


def percent(share: float) -> str:
    """A share (0 to 1) as a percentage.

    >>> percent(0.1234)
    '12.3%'
    """
    return f"{100 * share:.1f}%"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
