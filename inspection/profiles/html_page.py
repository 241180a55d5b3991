"""A profile as one HTML page that loads no other files: a flame chart of nested boxes, and the table below it.

A click on a box enlarges it to the full width; a click on the box of the step shows all again.
"""

from html import escape
from typing import Any

from sapwood.core.paths import Path
from sapwood.inspection.page import FONT
from sapwood.inspection.profiles.table import ITSELF, cells, lines, ms, notes, percent, total

_ROW = 26  # height of a level of the chart in pixels

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --name: #1d2733; --text: #55606b; --line: #d5dbe1;
  --forward: hsl(205 70% 84%); --backward: hsl(28 85% 84%); --other: #e9edf1; --hot: #d9480f; --box: #1d2733 }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --name: #eef2f6; --text: #a3afbb; --line: #353e48;
  --forward: hsl(205 55% 27%); --backward: hsl(28 60% 27%); --other: #2a323b; --hot: #ff922b; --box: #eef2f6 } }
body { margin: 0 auto; max-width: 1500px; padding: 14px 20px 40px; background: var(--page); color: var(--text);
  font: 13px/18px FONT }
h1 { margin: 0 0 2px; font-size: 17px; line-height: 24px; color: var(--name) }
p { margin: 0 } .key { margin: 12px 0 8px } .key i { display: inline-block; width: 12px; height: 12px;
  border-radius: 3px; margin: 0 5px 0 14px; vertical-align: -1px } .key i:first-child { margin-left: 0 }
.chart { position: relative; margin-bottom: 26px }
.chart button { position: absolute; height: 25px; box-sizing: border-box; overflow: hidden; padding: 0 6px; border: 0;
  border-right: 1px solid var(--page); border-radius: 4px; color: var(--box); font: 12px/25px FONT; text-align: left;
  white-space: nowrap; text-overflow: ellipsis; cursor: zoom-in }
.chart button.thin { padding: 0; font-size: 0 }
.chart button:hover, .chart button:focus-visible { outline: 2px solid var(--hot); outline-offset: -2px; z-index: 1 }
table { border-collapse: collapse; color: var(--name); font-variant-numeric: tabular-nums }
th { color: var(--text); font-weight: 500; text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line) }
td { padding: 2px 12px; text-align: right } th:first-child, td:first-child, th:last-child, td:last-child {
  text-align: left } td:first-child { white-space: pre } td:last-child, .own { color: var(--text) }
tbody tr:hover { background: var(--other) } tfoot td { border-top: 1px solid var(--line); font-weight: 600 }
"""

_SCRIPT = """
const boxes = [...document.querySelectorAll('.chart button')];
function show(from, width) {
  for (const box of boxes) {
    const x = +box.dataset.x - from, a = Math.max(0, x / width), b = Math.min(1, (x + +box.dataset.w) / width);
    box.hidden = b <= a;
    box.style.left = 100 * a + '%'; box.style.width = 100 * (b - a) + '%';
    box.classList.toggle('thin', b - a < 0.02);
  }
}
for (const box of boxes) box.onclick = () => show(+box.dataset.x, +box.dataset.w);
"""


def html(profile: Any) -> str:
    """The profile as an HTML page."""
    title = escape(f"{ms(profile.seconds)} ms per step on {profile.device}, {profile.steps} steps")
    said = "".join(f"<p>{escape(note)}</p>" for note in notes(profile))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE.replace('FONT', FONT)}</style></head><body><h1>{title}</h1>{said}"
        '<p class="key"><i style="background:var(--forward)"></i>forward'
        '<i style="background:var(--backward)"></i>backward<i style="background:var(--other)"></i>other; '
        f"a click on a box shows it larger, on the step all of it</p>{_chart(profile)}{_table(profile)}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def frame(profile: Any) -> str:
    """The page in an `<iframe>`, for a notebook."""
    levels = max(len(row.path) for row in profile.rows)
    return (
        f'<iframe srcdoc="{escape(html(profile))}" style="width:100%;height:{340 + _ROW * levels}px;'
        'border:1px solid #c9d0d7;border-radius:8px"></iframe>'
    )


def _chart(profile: Any) -> str:
    """The flame chart: the step as a box, and below each box the boxes of the paths in it. Width is time."""
    starts: dict[Path, float] = {(): 0.0}  # where the next box below a path begins
    top = [row for row in profile.rows if len(row.path) == 1]
    passes = sum(row.forward for row in top), sum(row.backward for row in top)
    found = [_box("step", "step", 0, 0.0, profile.seconds, *passes, profile.seconds)]
    for row in profile.rows:
        start = starts[row.path[:-1]]
        starts[row.path[:-1]], starts[row.path] = start + row.seconds, start
        where = "/".join(row.path)
        found.append(_box(row.path[-1], where, len(row.path), start, row.seconds, row.forward, row.backward,
                          profile.seconds))  # fmt: skip
    height = _ROW * (1 + max(len(row.path) for row in profile.rows))
    return f'<div class="chart" style="height:{height}px">{"".join(found)}</div>'


def _box(name: str, where: str, level: int, start: float, seconds: float, forward: float, backward: float,
         whole: float) -> str:  # fmt: skip
    said = f"{where}\n{ms(seconds)} ms per step, {percent(seconds / whole)}"
    colour = "var(--other)"
    if forward + backward > 0:
        said += f"\nforward {ms(forward)} ms, backward {ms(backward)} ms"
        ends = [f"{100 * part / seconds:.2f}%" for part in (forward, forward + backward)]
        colour = (f"linear-gradient(90deg,var(--forward) {ends[0]},var(--backward) {ends[0]} {ends[1]},"
                  f"var(--other) {ends[1]})")  # fmt: skip
    x, w = start / whole, seconds / whole
    thin = ' class="thin"' if w < 0.02 else ""
    return (
        f'<button{thin} title="{escape(said)}" data-x="{x:.6f}" data-w="{w:.6f}" style="top:{_ROW * level}px;'
        f'left:{100 * x:.4f}%;width:{100 * w:.4f}%;background:{colour}">{escape(name)} {ms(seconds)}</button>'
    )


def _table(profile: Any) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("layer", "ms/step", "share", "forward", "backward", "mostly"))
    body = ""
    for row in lines(profile):
        name = "   " * (len(row.path) - 1) + row.path[-1]
        own = ' class="own"' if row.path[-1] == ITSELF else ""
        body += f"<tr{own}>{_cells(name, cells(row, profile.seconds))}</tr>"
    return (f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f"<tfoot><tr>{_cells('total', total(profile))}</tr></tfoot></table>")  # fmt: skip


def _cells(name: str, rest: list[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in (name, *rest))
