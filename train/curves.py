"""Curves: `curves.png`, the picture of a run, drawn from its `metrics.jsonl`.

This file imports nothing of Sapwood, so that `start` can run it alone in a process of its own while training goes on:
importing Matplotlib takes 0.5 s.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

# Okabe and Ito's colours (2008), told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
VALIDATION = ("validation_", "valid_", "val_")
NOT_METRICS = {"step", "epoch", "time", "seconds", "examples"}


def draw(metrics: Any, picture: Any = None, title: str = "") -> Path:
    """Draw the rows of the log `metrics` (`metrics.jsonl`) into `picture`, by default `curves.png` beside it.

    A panel each for the loss, up to four other metrics (training and validation together) and the learning rate,
    over the step. Returns the picture's path.

    Raises FileNotFoundError where there is no log, ValueError where it has no numbers.
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
    """`draw` in a process of its own; `wait()` for what this returns before the run ends."""
    command = [sys.executable, "-P", __file__, str(metrics), title]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


_LARGEST = 1e300  # the axes of Matplotlib end near where floats do

Series = dict[str, tuple[list[float], list[float]]]


def _series(text: str) -> Series:
    """Steps and values by name; a half-written line, what is no number, and a name without finite ones is left out."""
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
    """A value of a log as a number, NaN and the infinities too, which are strings there: a line has a gap at them."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if abs(value) > _LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def _plain(name: str) -> str:
    for prefix in VALIDATION:
        name = name.removeprefix(prefix)
    return name


def _panels(series: Series) -> list[str]:
    """The loss first, the learning rate last, at most six."""
    names = list(dict.fromkeys(_plain(name) for name in series))
    rates = [name for name in names if "learning_rate" in name]
    first = [name for name in names if name == "loss"]
    rest = [name for name in names if name not in first + rates]
    return (first + rest)[: 6 - len(rates[:1])] + rates[:1]


def _figure(series: Series, panels: list[str], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    top = 0.55 if title else 0.25
    width, height = 4.5 * columns, 3.2 * rows + top
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Placed by hand: a layout engine draws everything twice. In inches: 0.6 at the left of a panel, 0.5 below it.
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - (top + 0.2) / height,
        wspace=0.2,
        hspace=0.4,
    )
    if title:
        figure.text(
            0.15 / width, 1 - 0.3 / height, title, fontsize=12, fontweight="bold", va="center", parse_math=False
        )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, panels, strict=False):
        _panel(axis, name, series)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _panel(axis: Any, name: str, series: Series) -> None:
    train = series.get(name)
    valid = next((series[prefix + name] for prefix in VALIDATION if prefix + name in series), None)
    rate = "learning_rate" in name
    if train:
        _train_line(axis, *train, color=GREEN if rate else BLUE)
    if valid:
        axis.plot(*valid, color=ORANGE, lw=1.8, marker="o", ms=3.5 if len(valid[0]) <= 40 else 0, label="validation")
    axis.set_title(name.replace("_", " "), fontsize=11, loc="left", color="#222222", parse_math=False)
    axis.set_xlabel("step", fontsize=9, color=GREY)
    _frame(axis)
    _scale(axis, name, [*(train or ([], []))[1], *(valid or ([], []))[1]])
    if valid:
        axis.legend(frameon=False, fontsize=9)
        _name_best(axis, name, *valid)


def _train_line(axis: Any, steps: list[float], values: list[float], color: str) -> None:
    """A noisy line is drawn pale, with its running mean over it."""
    if len(values) <= 50 or color == GREEN:
        axis.plot(steps, values, color=color, lw=1.8, label="training")
        return
    axis.plot(steps, values, color=color, lw=0.8, alpha=0.25)
    axis.plot(steps, _smooth(values, len(values) / 50), color=color, lw=1.8, label="training (running mean)")


def _smooth(values: list[float], width: float) -> list[float]:
    """An exponential mean, corrected for its start; what is not finite is passed over."""
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
    axis.locator_params(axis="x", nbins=6)


def _scale(axis: Any, name: str, values: list[float]) -> None:
    """A loss that falls by more than ten times is drawn on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = [value for value in values if math.isfinite(value)]
    if name == "loss" and finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axis.set_yscale("log")
        subs = (1, 2, 5) if max(finite) < 100 * min(finite) else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif "learning_rate" in name:
        axis.set_ylim(bottom=0)
    # Plain numbers, not powers of ten: those go through a formula parser that takes 0.2 s to import.
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_best(axis: Any, name: str, steps: list[float], values: list[float]) -> None:
    """Mark and name the best validation value."""
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        return
    lowest = any(word in name for word in ("loss", "error", "perplexity", "mae", "mse"))
    best = (min if lowest else max)(finite, key=lambda i: values[i])
    axis.plot(steps[best], values[best], "o", ms=7, mfc="none", mec=ORANGE, mew=1.5)
    axis.annotate(
        f"{values[best]:.4g}", (steps[best], values[best]), xytext=(0, 8 if lowest else -14),
        textcoords="offset points", ha="center", fontsize=9, color=ORANGE, fontweight="bold",
    )  # fmt: skip


if __name__ == "__main__":
    draw(sys.argv[1], title=sys.argv[2])
