"""`curves.png`: the picture of a run, drawn with Matplotlib from its `metrics.jsonl`.

This file imports nothing of Sapwood. So `start` can run it as a script, in a process of its own, while training
continues: importing Matplotlib takes 0.5 s.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

# Colors of Okabe and Ito (2008), distinguishable with any kind of color vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
VALIDATION = ("validation_", "valid_", "val_")
NOT_METRICS = {"step", "epoch", "time", "seconds", "examples"}


def draw(metrics: Any, picture: Any = None, title: str = "") -> Path:
    """Draw the rows of a log into a PNG picture.

    There is one panel for the loss, for up to four other metrics (training and validation together) and for the
    learning rate, over the step.

    Args:
        metrics: path of the log, `metrics.jsonl`.
        picture: path of the picture; None is `curves.png` beside the log.
        title: text above the panels; empty for none.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log has no numbers.
    """
    metrics = Path(metrics).expanduser()
    picture = Path(picture).expanduser() if picture is not None else metrics.with_name("curves.png")
    series = _series(metrics.read_text(encoding="utf-8"))
    panels = _panels(series)
    if not panels:
        raise ValueError(f"{metrics} has no rows with numbers to draw")
    figure = _figure(series, panels, title)
    unfinished = picture.with_name(picture.name + ".part")
    figure.savefig(unfinished, format="png", dpi=144)
    unfinished.replace(picture)
    return picture


def start(metrics: Any, title: str = "") -> subprocess.Popen:
    """Run `draw` in a process of its own, and return that process; call its `wait()` before the run ends."""
    command = [sys.executable, "-P", __file__, str(metrics), title]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


_LARGEST = 1e300  # larger values are drawn as infinite: Matplotlib's axes end near the largest float

Series = dict[str, tuple[list[float], list[float]]]
"""Steps and values by the name of the metric."""


def _series(text: str) -> Series:
    """Read steps and values by name from the text of a log.

    Skips an incomplete line, values that are not numbers, and names without any finite value.
    """
    series: Series = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items() if isinstance(row, dict) else ():
            if name in NOT_METRICS or name.endswith(("/s", "_per_second", "seconds")):
                continue
            if (number := _number(value)) is not None:
                steps, values = series.setdefault(name, ([], []))
                step = _number(row.get("step"))
                steps.append(float(len(steps)) if step is None else step)
                values.append(number)
    return {name: found for name, found in series.items() if any(map(math.isfinite, found[1]))}


def _number(value: Any) -> float | None:
    """Convert a value of a log to a float; None if it is no number.

    NaN and infinities, which are strings in the log, are kept: the line has a gap there.
    """
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if abs(value) > _LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def _plain(name: str) -> str:
    """Return the name of a metric without its prefix for validation."""
    for prefix in VALIDATION:
        name = name.removeprefix(prefix)
    return name


def _panels(series: Series) -> list[str]:
    """Return the names of the panels, at most six: the loss first, the learning rate last."""
    names = list(dict.fromkeys(_plain(name) for name in series))
    rates = [name for name in names if "learning_rate" in name]
    first = [name for name in names if name == "loss"]
    rest = [name for name in names if name not in first + rates]
    return (first + rest)[: 6 - len(rates[:1])] + rates[:1]


WIDTH, HEIGHT, TITLE, HEAD, FOOT, RIGHT = 4.5, 3.2, 0.4, 0.55, 0.5, 0.25
"""Inches: a panel's width and height with its margins, the title, and the margins above, below and beside."""
DIGIT = 0.08
"""Inches of a digit at an axis, at most."""


def _figure(series: Series, panels: list[str], title: str) -> Any:
    """Make the figure.

    All positions are computed in inches, so that no texts overlap. A layout engine would draw everything twice.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    top = TITLE if title else 0.1
    width, height = WIDTH * columns, HEIGHT * rows + top
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    if title:
        place = 0.15 / width, 1 - 0.25 / height
        _fit(figure.text(*place, title, fontsize=12, fontweight="bold", va="center", parse_math=False), width - 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    numbers = [_panel(axis, name, series) for axis, name in zip(axes, panels, strict=False)]
    left = 0.2 + DIGIT * max(len(number) for some in numbers for number in some)
    for place, axis in enumerate(axes):
        row, column = divmod(place, columns)
        bottom = height - top - (row + 1) * HEIGHT + FOOT
        box = column * WIDTH + left, bottom, WIDTH - left - RIGHT, HEIGHT - HEAD - FOOT
        axis.set_position([box[0] / width, box[1] / height, box[2] / width, box[3] / height])
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _fit(text: Any, width: float) -> None:
    """Shorten a text until it is at most ``width`` inches wide."""
    renderer = text.figure.canvas.get_renderer()
    whole = text.get_text()
    size = len(whole)
    while size > 1 and text.get_window_extent(renderer).width > width * text.figure.dpi:
        size = int(size * 0.95)
        text.set_text(f"{whole[:size].rstrip()}…")


def _panel(axis: Any, name: str, series: Series) -> list[str]:
    """Draw one panel, and return the labels of its vertical axis.

    The legend is above the lines, in their colors.
    """
    train = series.get(name)
    valid = next((series[prefix + name] for prefix in VALIDATION if prefix + name in series), None)
    rate = "learning_rate" in name
    title = {"fontsize": 11, "loc": "left", "color": "#222222", "parse_math": False, "pad": 20 if valid else 6}
    _fit(axis.set_title(name.replace("_", " "), **title), WIDTH - 1.3)
    axis.set_xlabel("step", fontsize=9, color=GREY)
    _frame(axis)
    if train:
        smooth = _train_line(axis, *train, color=GREEN if rate else BLUE)
        if valid:
            _head(axis, f"— training{', smoothed' * smooth}", BLUE, 0)
    if valid:
        axis.plot(*valid, color=ORANGE, lw=1.8, marker="o", ms=3.5 if len(valid[0]) <= 40 else 0)
        best = _mark_best(axis, name, *valid)
        _head(axis, f"— validation{'' if best is None else f', best {_short(best, 4)}'}", ORANGE, 1)
    return _scale(axis, name, [*(train or ([], []))[1], *(valid or ([], []))[1]])


def _head(axis: Any, text: str, color: str, side: int) -> None:
    """Write a part of the legend above a panel: at its left if ``side`` is 0, at its right if it is 1."""
    axis.annotate(
        text, (side, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=color,
        ha="right" if side else "left", parse_math=False,
    )  # fmt: skip


def _train_line(axis: Any, steps: list[float], values: list[float], color: str) -> bool:
    """Draw the training curve, and return True if it is smoothed.

    A curve of more than 50 values is drawn pale, with its running mean over it; the learning rate is never smoothed.
    """
    if len(values) <= 50 or color == GREEN:
        axis.plot(steps, values, color=color, lw=1.8, marker="o" if len(values) == 1 else None, ms=3.5)
        return False
    axis.plot(steps, values, color=color, lw=0.8, alpha=0.25)
    axis.plot(steps, _smooth(values, len(values) / 50), color=color, lw=1.8)
    return True


def _smooth(values: list[float], width: float) -> list[float]:
    """Compute the exponential moving average, corrected for its start. Values that are not finite are skipped."""
    keep = 1 - 1 / max(width, 1.0)
    mean = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight if weight else math.nan)
    return out


def _frame(axis: Any) -> None:
    axis.grid(axis="y", color="#e6e6e6", lw=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.02)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#bbbbbb")
    axis.tick_params(which="both", length=0, labelsize=9, colors=GREY)


def _scale(axis: Any, name: str, values: list[float]) -> list[str]:
    """Scale both axes, and return the labels of the vertical one.

    The axis of a loss that falls by more than ten times is logarithmic. Labels are plain numbers, not powers of ten:
    Matplotlib draws those with a formula parser that takes 0.2 s to import.
    """
    from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

    finite = [value for value in values if math.isfinite(value)]
    if name == "loss" and finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(finite) < 100 * min(finite) else (1,)))
    elif "learning_rate" in name:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    low, high = axis.get_ylim()
    texts: dict[str, list[str]] = {}
    for line, written in ((axis.yaxis, _apart), (axis.xaxis, _steps)):
        least, most = sorted((low, high) if line is axis.yaxis else axis.get_xlim())
        ticks = [float(tick) for tick in line.get_majorticklocs() if least <= tick <= most]
        ticks = [tick for tick in ticks if line is axis.yaxis or tick == int(tick)]
        texts[line.axis_name] = written(ticks)
        line.set_major_locator(FixedLocator(ticks))
        line.set_major_formatter(FixedFormatter(texts[line.axis_name]))
    return texts["y"] or [""]


def _apart(ticks: list[float]) -> list[str]:
    """Format numbers with as few digits as tell them apart.

    >>> _apart([123456789.0, 123456790.0]), _apart([0.0, 5e-05, 0.0001])
    (['123456789', '123456790'], ['0', '5e-5', '0.0001'])
    """
    gap = min((b - a for a, b in itertools.pairwise(ticks)), default=0.0)
    for digits in range(1, 17):
        texts = [_short(tick, digits) for tick in ticks]
        if all(abs(float(text) - tick) <= 0.01 * gap for text, tick in zip(texts, ticks, strict=True)):
            break
    return texts if ticks else []


def _short(value: float, digits: int) -> str:
    """Format a number with ``digits`` significant digits, and a large or tiny one with an exponent."""
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    if exponent and 0 <= int(exponent) < digits + 3 and int(exponent) < 6:
        return f"{float(mantissa + 'e' + exponent):.0f}"
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _steps(ticks: list[float]) -> list[str]:
    """Format the numbers of steps, with the units k, M and G.

    >>> _steps([500.0, 1000.0]), _steps([0.0, 5000.0, 15000.0]), _steps([2.5e6])
    (['500', '1000'], ['0', '5k', '15k'], ['2.5M'])
    """
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    unit, letter = next(((unit, letter) for most, unit, letter in units if ticks and ticks[-1] >= most), (1, ""))
    return [f"{tick / unit:g}{letter if tick else ''}" for tick in ticks]


def _mark_best(axis: Any, name: str, steps: list[float], values: list[float]) -> float | None:
    """Mark the best validation value, and return it; None if no value is finite.

    Lower is better for losses, errors and perplexity, higher for anything else.
    """
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        return None
    lowest = any(word in name for word in ("loss", "error", "perplexity", "mae", "mse"))
    best = (min if lowest else max)(finite, key=lambda i: values[i])
    axis.plot(steps[best], values[best], "o", ms=7, mfc="none", mec=ORANGE, mew=1.5)
    return values[best]


if __name__ == "__main__":
    draw(sys.argv[1], title=sys.argv[2])
