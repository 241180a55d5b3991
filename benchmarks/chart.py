"""The chart of the results: one panel for each race, with each system's ratio to the floor and its interval."""

import statistics
from pathlib import Path

from benchmarks.ratios import ratio
from benchmarks.report import duration
from benchmarks.suite import Suite

PANELS = ("mlp", "conv", "gpt", "deep-start", "deep-unrolled", "gpt-start", "deep-step", "input-digits", "input-images",
          "input-reading", "checkpoint", "import")  # fmt: skip
OURS, PEER, FLOOR = "#3f7d4e", "#8d8778", "#b5482f"


def draw(results: list[tuple[Suite, dict]], path: Path) -> None:
    """Draw the chart of these races to a file; the path's suffix is the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(suite, found, m) for suite, found in results if suite.name in PANELS for m in suite.measures[:2]]
    panels.sort(key=lambda panel: PANELS.index(panel[0].name))
    rows = -(-len(panels) // 2)
    bars = [max(len(points(*panel)) for panel in panels[i : i + 2]) for i in range(0, len(panels), 2)]
    with plt.rc_context({"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "0"}):
        figure, axes = plt.subplots(
            rows, 2, figsize=(10, sum(0.26 * n + 0.95 for n in bars)), squeeze=False, layout="constrained",
            gridspec_kw={"height_ratios": [n + 2 for n in bars]},
        )  # fmt: skip
        for axis, panel in zip(axes.flat, panels, strict=False):
            _panel(axis, *panel)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        plt.close(figure)


def points(suite: Suite, found: dict, measure: str) -> list[tuple]:
    """Each system except the floor with its ratio to the floor, the fastest first."""
    rounds = found["rounds"]
    there = [s for s in suite.systems if s != suite.floor_of(s) and all(measure in r.get(s, ()) for r in rounds)]
    return sorted(((s, ratio(rounds, s, suite.floor_of(s), measure)) for s in there), key=lambda point: point[1].median)


def _panel(axis, suite: Suite, found: dict, measure: str) -> None:
    floor = suite.systems[0]
    seconds = statistics.median(r[floor][measure] for r in found["rounds"])
    shown = points(suite, found, measure)
    axis.axvline(1.0, color=FLOOR, linewidth=1)
    for y, (system, r) in enumerate(reversed(shown)):
        colour = OURS if system.startswith("sapwood") else PEER
        axis.plot([r.low, r.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt", alpha=0.45)
        axis.plot([r.median], [y], "o", color=colour, markersize=5.5)
        axis.annotate(f"{r.median:.2f}", (r.high, y), (5, 0), textcoords="offset points", va="center", color=colour,
                      fontsize=8)  # fmt: skip
    of = {system: "" if suite.floor_of(system) == floor else f" (of {suite.floor_of(system)})" for system, _ in shown}
    axis.set_yticks(range(len(shown)), [f"{system}{of[system]}" for system, _ in reversed(shown)])
    for label in axis.get_yticklabels():
        if label.get_text().startswith("sapwood"):
            label.set(color=OURS, fontweight="bold")
    low, high = min(r.low for _, r in shown), max(r.high for _, r in shown)
    if high / low > 4:
        axis.set_xscale("log")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 2 < t < high * 2]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.set_xlim(min(low, 1) / 1.2, max(high, 1) * 1.5)
    else:
        margin = max(high, 1) - min(low, 1) or 0.1
        axis.set_xlim(min(low, 1) - 0.08 * margin, max(high, 1) + 0.2 * margin)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.grid(axis="x", color="#e4e0d6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    name = suite.name if len(suite.measures) == 1 else f"{suite.name}: {measure}"
    axis.set_title(f"{name}  ($\\times$ {floor}, {duration(seconds)})", loc="right", fontsize=9.5, fontweight="bold")
