"""A drawing as one HTML page that loads no other files.

The browser lays out boxes in nested CSS grids, `<details>` elements open and close groups, and a script draws the edges
anew after each change. `svg` has the same geometry of edges in Python: change both.
"""

import json
from html import escape
from typing import TYPE_CHECKING

from sapwood.inspection.graphs.boxes import Group, Node
from sapwood.inspection.graphs.grid import Grid, grid, item_of
from sapwood.inspection.graphs.look import GAP_X, GAP_Y, LANE, PAD, hues, layer_class, legend, lines, tooltip
from sapwood.inspection.page import FONT

if TYPE_CHECKING:
    from sapwood.inspection.graphs.graph import Graph

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --name: #1d2733; --text: #55606b; --line: #7d8a97; --op: #f1f3f5;
  --op-edge: #c9d0d7; --end: #2f3b48; --end-name: #fff; --end-text: #c8d2dc; --closed: #fff; --closed-edge: #8b98a5;
  --group: rgb(100 116 139 / .055); --group-edge: #a9b4bf; --fill: 95%; --edge: 62%; --hot: #d9480f }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --name: #eef2f6; --text: #a3afbb; --line: #76828f;
  --op: #252c34; --op-edge: #414b56; --end: #dfe6ed; --end-name: #14181d; --end-text: #4b5763; --closed: #1d232a;
  --closed-edge: #6b7885; --group: rgb(148 163 184 / .07); --group-edge: #46515d; --fill: 17%; --edge: 42%;
  --hot: #ff922b } }
body { margin: 0; background: var(--page); color: var(--text); font: 11px/16px FONT }
header { position: sticky; left: 0; top: 0; z-index: 3; padding: 8px 16px; background: var(--page); color: var(--name);
  font-size: 13px; border-bottom: 1px solid var(--op-edge); width: calc(100vw - 32px); box-sizing: content-box }
header b { margin-right: 12px }
button { font: inherit; font-size: 12px; color: var(--text); background: var(--op); border: 1px solid var(--op-edge);
  border-radius: 6px; padding: 2px 10px; margin-left: 6px; cursor: pointer }
.scroll { display: flex; min-width: max-content }
main { position: relative; margin: 0 auto; padding: PADpx }
svg { position: absolute; left: 0; top: 0; pointer-events: none; overflow: visible }
path.edge { fill: none; stroke: var(--line); stroke-width: 1.4; pointer-events: stroke }
path.hot { stroke: var(--hot); stroke-width: 2.2 }
circle { fill: var(--line) } marker path { fill: var(--line) }
.grid { display: grid; column-gap: GAP_Xpx; row-gap: GAP_Ypx; justify-content: center; width: max-content }
.grid > * { justify-self: center; align-self: center; min-width: 0 }
.grid > i { visibility: hidden; width: LANEpx; align-self: stretch; pointer-events: none }
.grid > i.row { justify-self: stretch; width: auto } .grid > i.port { width: 8px; height: 0; align-self: start }
.box { border: 1.2px solid; border-radius: 7px; padding: 7px 13px; text-align: center; white-space: nowrap;
  background: hsl(var(--hue) 62% var(--fill)); border-color: hsl(var(--hue) 38% var(--edge)) }
.box b, summary b { display: block; font-size: 13px; color: var(--name); font-weight: 600 }
.op { background: var(--op); border-color: var(--op-edge); border-radius: 14px; padding: 4px 13px }
.op b { font-size: 11.5px; font-weight: 500 }
.end { background: var(--end); border-color: var(--end); border-radius: 12px; color: var(--end-text) }
.end b { color: var(--end-name) }
details { border: 1.2px solid var(--closed-edge); border-radius: 9px; background: var(--closed); white-space: nowrap;
  box-shadow: 3px 3px 0 -1px var(--page), 3px 3px 0 0 var(--closed-edge) }
details[open] { background: var(--group); border-color: var(--group-edge); box-shadow: none; padding-bottom: PADpx }
details.many[open] { box-shadow: 4px 4px 0 -1px var(--page), 4px 4px 0 0 var(--group-edge) }
summary { list-style: none; cursor: pointer; padding: 8px 20px; text-align: center }
details[open] > summary { text-align: left; padding: 8px 14px 14px }
summary::-webkit-details-marker { display: none }
summary b::before { content: "+ "; color: var(--line) } details[open] > summary b::before { content: "− " }
summary span { display: inline-block } details > .grid { margin: 0 auto }
details:hover:not(:has(details:hover)), .box:hover { border-color: var(--hot) }
summary:focus-visible { outline: 2px solid var(--hot); border-radius: 8px }
"""

_SCRIPT = """
const PAD = %(pad)d, GAP = %(gap)d, main = document.querySelector('main'), svg = main.querySelector('svg');
const $ = id => document.getElementById(id);
const shown = e => e && !e.parentElement.closest('details:not([open])');
function at(e) {  // where an element is in the drawing
  const r = e.getBoundingClientRect(), m = main.getBoundingClientRect();
  const left = r.left - m.left, right = r.right - m.left;
  return { x: (left + right) / 2, top: r.top - m.top, bottom: r.bottom - m.top, left, right };
}
function balance() {  // keep the middle column of every group in its middle, innermost groups first
  for (const grid of [...main.querySelectorAll('.grid')].reverse()) {
    grid.style.paddingLeft = grid.style.paddingRight = PAD + 'px';
    grid.parentElement.style.minWidth = '';
    if (!shown(grid)) continue;
    const text = grid.parentElement.querySelector(':scope > summary span');
    grid.parentElement.style.minWidth = text ? 2 * text.getBoundingClientRect().width + 56 + 'px' : '';
    const all = at(grid), mid = at(grid.querySelector(':scope > .mid')).x, lean = (all.right - mid) - (mid - all.left);
    grid.style[lean > 0 ? 'paddingLeft' : 'paddingRight'] = PAD + Math.abs(lean) + 'px';
  }
}
function bend(x1, y1, x2, y2, where) {
  const across = x2 - x1;
  if (Math.abs(across) < 0.5) return ` V${y2}`;
  const middle = y1 + where * (y2 - y1), r = Math.min(8, Math.abs(middle - y1), Math.abs(across) / 2);
  const side = across > 0 ? r : -r, turn = y2 > y1 ? r : -r;
  return ` V${middle - turn} q0,${turn} ${side},${turn} H${x2 - side} q${side},0 ${side},${turn} V${y2}`;
}
function back(x1, y1, lane, x2, y2) {  // out below, up again beside everything, and in from above
  const r = GAP / 4, out = lane > x1 ? r : -r, home = x2 > lane ? r : -r;
  return ` V${y1 + r} q0,${r} ${out},${r} H${lane - out} q${out},0 ${out},${-r}` +
    ` V${y2 - r} q0,${-r} ${home},${-r} H${x2 - home} q${home},0 ${home},${r} V${y2}`;
}
function end(group, name, item, below) {  // x and y of an end of an edge; below: it leaves there
  const box = $(item), port = $(name), frame = $(group), r = at(box);
  if (port === box && box.classList.contains('port')) return [r.x, below ? at(frame).top : at(frame).bottom];
  return [port && shown(port) ? at(port).x : r.x, below ? r.bottom : r.top];
}
function draw() {
  balance();
  svg.setAttribute('width', main.scrollWidth); svg.setAttribute('height', main.scrollHeight);
  let out = '';
  const dots = new Set(), done = new Set();
  for (const e of EDGES) {
    const grid = $(e.g + '.grid');
    if (!shown(grid)) continue;
    const [x1, y1] = end(e.g, e.s, e.si, true), [x2, y2] = end(e.g, e.t, e.ti, false);
    const row = k => at($(e.g + '.row' + k));
    const down = row(e.r1).bottom, into = row(e.r2).top;
    let way = `M${x1},${y1}`;
    if (e.l === null) way += bend(x1, down, x2, into, e.b[0]);
    else {
      const lane = at($(e.g + '.' + e.l)).x;
      if (e.r2 <= e.r1) way += back(x1, down, lane, x2, into);
      else way += bend(x1, down, lane, row(e.l0).top, e.b[0]) + bend(lane, row(e.l1).bottom, x2, into, e.b[1]);
    }
    way += ` V${y2}`;
    if (done.has(way)) continue;
    done.add(way);
    const from = $(e.s) === $(e.si) && $(e.si).classList.contains('port'), to = $(e.ti).classList.contains('port');
    if (from) dots.add(`${x1},${y1}`);
    if (to) dots.add(`${x2},${y2}`);
    const tip = to ? '' : ' marker-end="url(#tip)"';
    out += `<path class="edge" data-s="${e.si}" data-t="${e.ti}" d="${way}"${tip}><title>${e.d}</title></path>`;
  }
  for (const dot of dots) out += `<circle cx="${dot.split(',')[0]}" cy="${dot.split(',')[1]}" r="2.6"/>`;
  svg.querySelector('g').innerHTML = out;
}
function all(open) { for (const d of main.querySelectorAll('details')) d.open = open; }
main.addEventListener('toggle', draw, true);
main.addEventListener('mouseover', event => {
  const box = event.target.closest('.box, details');
  for (const path of svg.querySelectorAll('.edge'))
    path.classList.toggle('hot', !!box && (path.dataset.s === box.id || path.dataset.t === box.id));
});
addEventListener('resize', draw);
draw();
"""


def html(graph: "Graph") -> str:
    """The drawing as an HTML page."""
    page = _Page(graph)
    body = page.contents(graph.root)
    style = _STYLE.replace("FONT", FONT)
    for name, size in (("PAD", PAD), ("GAP_X", GAP_X), ("GAP_Y", GAP_Y), ("LANE", LANE)):
        style = style.replace(f"{name}px", f"{size}px")
    edges = json.dumps(page.edges, separators=(",", ":")).replace("</", "<\\/")
    script = _SCRIPT.replace("%(pad)d", str(PAD)).replace("%(gap)d", str(GAP_Y))
    buttons = "" if not page.groups else (
        '<button onclick="all(true)">open all</button><button onclick="all(false)">close all</button>'
    )  # fmt: skip
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{legend(graph)}</title>'
        f"<style>{style}</style></head><body><header><b>{legend(graph)}</b>{buttons}</header>"
        f'<div class="scroll"><main id="{graph.root.id}">{body}<svg aria-hidden="true"><defs><marker id="tip" '
        'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="90"><path '
        'd="M0,0.8 L7.5,4 L0,7.2 z"/></marker></defs><g></g></svg></main></div>'
        f"<script>const EDGES = {edges};{script}</script></body></html>\n"
    )


def frame(graph: "Graph") -> str:
    """The page in an `<iframe>`, for a notebook."""
    return (
        f'<iframe srcdoc="{escape(html(graph))}" style="width:100%;height:640px;border:1px solid #c9d0d7;'
        'border-radius:8px"></iframe>'
    )


class _Page:
    """Writes boxes as nested elements, and collects `edges` as data for the script."""

    def __init__(self, graph: "Graph"):
        self.graph, self.hues = graph, hues(graph)
        self.edges: list[dict] = []
        self.groups = 0

    def contents(self, group: Group) -> str:
        """The items of a group in a CSS grid, with invisible elements that mark rows, lanes and the middle column."""
        placed = grid(group)
        column = {c: k + 1 for k, c in enumerate(placed.tracks)}
        parts = [f'<i class="row" id="{group.id}.row{k}" style="grid-area:{k + 1}/1/{k + 2}/-1"></i>'
                 for k in range(placed.height)]  # fmt: skip
        parts.append(f'<i class="mid" style="grid-area:1/{column[0.0]}"></i>')
        lanes: dict = {}
        for lane in placed.lanes.values():
            lanes.setdefault(lane, f"lane{len(lanes)}")
        for lane, name in lanes.items():
            area = f"{lane.first + 1}/{column[lane.column]}/{lane.last + 2}"
            parts.append(f'<i id="{group.id}.{name}" style="grid-area:{area}"></i>')
        for item in group.items:
            parts.append(self._item(item, f"grid-area:{placed.rows[item.id] + 1}/{column[placed.columns[item.id]]}"))
        self._edges(group, placed, lanes)
        widths = f"grid-template-columns:repeat({len(column)},minmax({LANE}px,auto))"
        return f'<div class="grid" id="{group.id}.grid" style="{widths}">{"".join(parts)}</div>'

    def _item(self, item: Node | Group, area: str) -> str:
        if item.kind in ("in", "out"):
            return f'<i class="port" id="{item.id}" style="{area}"></i>'
        said = "".join(f"<br>{escape(line)}" for line in lines(item)).removeprefix("<br>")
        text = f"<b>{escape(item.name)}</b>{said}"
        head = f'id="{item.id}" title="{escape(tooltip(item))}"'
        if isinstance(item, Group):
            self.groups += 1
            mark = " open" if item.id in self.graph.opened else ""
            many = ' class="many"' if item.copies > 1 else ""
            label, inside = f"<summary><span>{text}</span></summary>", self.contents(item)
            return f'<details {head}{many} style="{area}"{mark}>{label}{inside}</details>'
        kind = "op" if item.kind == "op" else "end" if item.kind in ("input", "output") else ""
        hue = "" if kind else f";--hue:{self.hues[layer_class(item)]}"
        return f'<div class="{f"box {kind}".strip()}" {head} style="{area}{hue}">{text}</div>'

    def _edges(self, group: Group, placed: Grid, lanes: dict) -> None:
        for edge in placed.edges:
            source, target, lane = item_of(edge.source, group), item_of(edge.target, group), placed.lanes.get(edge)
            self.edges.append({
                "g": group.id, "s": edge.source, "t": edge.target, "si": source, "ti": target, "d": escape(edge.shape),
                "r1": placed.rows[source], "r2": placed.rows[target], "b": [round(b, 3) for b in placed.bends[edge]],
                "l": lanes[lane] if lane else None, "l0": lane.first if lane else 0, "l1": lane.last if lane else 0,
            })  # fmt: skip
