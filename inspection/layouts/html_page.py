"""A layout as one HTML page that loads no other files.

The page shows the mesh as a grid of devices, the chosen array as a grid of slices, and a table of all arrays. Its
script draws all of it from the JSON that `html` writes into the page.
"""

import json
from html import escape
from typing import Any

from sapwood.inspection.layouts import rows
from sapwood.inspection.page import FONT
from sapwood.parallel.meshes import AXES

HUES = {"replica": 0, "data": 205, "stage": 45, "fsdp": 150, "expert": 330, "sequence": 185, "tensor": 275}
"""The hue of each mesh axis in degrees. Axes with other names get hues that are not in this table."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --name: #1d2733; --text: #55606b; --line: #d5dbe1; --soft: #f4f6f8;
  --hot: #d9480f; --chip: 88%; --chip-text: 26%; --slice: 68%; --edge: 45% }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --name: #eef2f6; --text: #a3afbb; --line: #353e48;
  --soft: #1c2229; --hot: #ff922b; --chip: 24%; --chip-text: 80%; --slice: 46%; --edge: 66% } }
body { margin: 0 auto; max-width: 1400px; padding: 14px 20px 40px; background: var(--page); color: var(--text);
  font: 13px/18px FONT }
h1 { margin: 0 0 2px; font-size: 17px; line-height: 24px; color: var(--name) } p { margin: 0 }
h2 { margin: 0 0 8px; font-size: 13px; font-weight: 600; color: var(--name) }
.top { position: sticky; top: 0; z-index: 2; background: var(--page); padding: 12px 0; border-bottom: 1px solid
  var(--line); margin-bottom: 12px; display: flex; flex-wrap: wrap; gap: 14px 36px; align-items: flex-start }
.top > div { min-width: 0 } #what { flex: 1; min-width: 260px } #what b { color: var(--name); font-size: 14px }
svg { display: block; max-width: 100% } rect:not([stroke]) { stroke: var(--page) }
rect.off { fill: var(--soft); stroke: var(--line) }
rect.hot { stroke: var(--hot); stroke-width: 2.5 } text { fill: var(--text); font: 11px FONT }
.chip { display: inline-block; padding: 0 6px; border-radius: 8px; line-height: 17px; font-size: 12px;
  background: hsl(var(--h) 55% var(--chip)); color: hsl(var(--h) 60% var(--chip-text)) }
.dims { white-space: nowrap } .dims i { font-style: normal; opacity: .7 } .dims span { color: var(--name) }
input { font: inherit; width: 300px; max-width: 100%; padding: 4px 10px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--soft); color: var(--name); box-sizing: border-box; margin-bottom: 10px }
details { border-left: 1px solid var(--line); margin-left: 5px; padding-left: 12px }
details.kind { border: 0; margin: 0; padding: 0 } summary { cursor: pointer; color: var(--name); padding: 2px 0 }
summary small, .sum { color: var(--text); font-size: 12px; font-variant-numeric: tabular-nums; margin-left: 8px }
details.kind > summary { font-weight: 600 }
.row { display: flex; gap: 14px; align-items: baseline; width: 100%; box-sizing: border-box; padding: 2px 8px;
  border: 0; border-radius: 5px; background: none; color: var(--name); font: inherit; text-align: left;
  cursor: pointer }
.row:hover, .row:focus-visible { background: var(--soft); outline: none } .row.on { background: var(--soft);
  box-shadow: inset 3px 0 var(--hot) } .row > :first-child { flex: 1; min-width: 90px; overflow-wrap: anywhere }
.row .kind { width: 110px } .row .size { width: 86px; text-align: right; font-variant-numeric: tabular-nums }
.row small { color: var(--text) }
.row .share { width: 60px; height: 6px; border-radius: 3px; background: var(--line); align-self: center; flex: none }
.row .share i { display: block; height: 100%; border-radius: 3px; background: var(--edge-colour, #8b98a5) }
@media (max-width: 700px) { .row .share, .row small { display: none } .row { flex-wrap: wrap } }
"""

_SCRIPT = """
const { axes, rows } = LAYOUT, $ = id => document.getElementById(id), N = axes.reduce((n, a) => n * a.size, 1);
const make = (tag, given, ...inside) => { const e = Object.assign(document.createElement(tag), given);
  e.append(...inside); return e; };
const hue = Object.fromEntries(axes.map(a => [a.name, a.hue]));
const size = Object.fromEntries(axes.map(a => [a.name, a.size]));
function bytes(n) { for (const u of ['B', 'KiB', 'MiB', 'GiB']) { if (n < 1024) return u === 'B' ? n + ' B' :
  n.toFixed(1) + ' ' + u; n /= 1024; } return n.toFixed(1) + ' TiB'; }
function places(d) { const at = {}; for (const a of [...axes].reverse()) { at[a.name] = d % a.size;
  d = Math.floor(d / a.size); } return at; }
function slice(row, d) {  // which slice of an array a device holds: a number for each dimension
  const at = places(d); return row.split.map(names => names.reduce((k, name) => k * size[name] + at[name], 0)); }
const parts = row => row.split.map(names => names.reduce((n, name) => n * size[name], 1));
function colour(row, s) {  // neighbours differ; the hue is that of the axis where one alone splits the array
  const p = parts(row), n = p.reduce((a, b) => a * b, 1), k = s.reduce((k, i, j) => k * p[j] + i, 0);
  const names = row.split.flat(), base = names.length === 1 ? hue[names[0]] : 205;
  if (n === 1) return `hsl(${215} 12% var(--slice))`;
  const turn = names.length === 1 ? 70 * (k / (n - 1) - .5) : 360 * k / n;
  return `hsl(${(base + turn + 360) % 360} 55% calc(var(--slice) + ${k % 2 ? 5 : -5}%))`; }
function svg(width, height, inside) {
  return `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">${inside}</svg>`; }
// The mesh: the last two axes make a grid, the others repeat it, by turns to the right and downwards.
const big = axes.filter(a => a.size > 1), shown = (big.length ? big : axes.slice(-1)).reverse();
let side = 26, flip = 0;
const across = k => k % 2 === flip;
function where(at) { let x = 0, y = 0, w = side, h = side;
  shown.forEach((a, k) => { const gap = k < 2 ? (side > 8 ? 2 : 1) : 4 + 2 * k, i = at[a.name];
    if (shown.length === 1) { x = i % 32 * (w + gap); y = Math.floor(i / 32) * (h + gap); }
    else if (across(k)) { x += i * (w + gap); w = a.size * (w + gap) - gap; }
    else { y += i * (h + gap); h = a.size * (h + gap) - gap; } });
  return [x, y]; }
function corner() { const at = Object.fromEntries(axes.map(a => [a.name, a.size - 1]));
  return shown.length === 1 ? [where({ [shown[0].name]: Math.min(31, shown[0].size - 1) })[0] + side,
    where(at)[1] + side] : where(at).map(end => end + side); }
const fits = () => corner().every((end, k) => end <= [620, 250][k]);
search: for (side of [26, 21, 17, 14, 11, 9, 7, 5, 4, 3]) for (flip of [0, 1]) if (fits()) break search;
if (!fits()) { flip = 0; const tall = corner()[1]; flip = 1; if (corner()[1] > tall) flip = 0; }
for (const e of document.querySelectorAll('h2 .chip')) { const k = shown.findIndex(a => a.name === e.dataset.axis);
  if (k >= 0) e.append(shown.length === 1 || across(k) ? ' →' : ' ↓'); }
let current = null;
function mesh(row) {
  let inside = '';
  const [right, bottom] = corner();
  for (let d = 0; d < N; d++) { const [x, y] = where(places(d));
    const at = axes.map(a => a.name + ' ' + places(d)[a.name]).join(', ');
    const held = row ? slice(row, d) : null, said = `device ${d}: ${at}` + (row ? '\\n' + range(row, held) : '');
    inside += `<rect x="${x + 2}" y="${y + 2}" width="${side}" height="${side}" rx="${Math.min(4, side / 5)}"
      data-s="${held}" ${row ? `fill="${colour(row, held)}"` : 'class="off"'}><title>${said}</title></rect>`; }
  $('mesh').innerHTML = svg(right + 4, bottom + 4, inside); }
function range(row, s) { const p = parts(row); return row.shape.length ?
  row.shape.map((n, k) => p[k] === 1 ? ':' : `${s[k] * n / p[k]}:${(s[k] + 1) * n / p[k]}`).join(', ') : 'the whole'; }
function array(row) {  // the two dimensions that are split most, as a rectangle of slices; others as they come
  const p = parts(row), order = p.map((n, k) => k);
  order.sort((a, b) => p[b] - p[a] || row.shape[b] - row.shape[a]).splice(2);
  order.sort((a, b) => a - b);
  if (!row.shape.length) order.length = 0;
  const [r, c] = order.length > 1 ? order : [null, order[0] ?? null], long = 320;
  const rows_ = r === null ? 1 : row.shape[r], cols = c === null ? 1 : row.shape[c], most = Math.max(rows_, cols);
  const w = Math.max(90, long * Math.sqrt(cols / most));
  const h = r === null ? 26 : Math.max(50, 190 * Math.sqrt(rows_ / most));
  const nr = r === null ? 1 : p[r], nc = c === null ? 1 : p[c]; let inside = '';
  const line = Math.min(w / nc, h / nr) < 6 ? 'stroke="none"' : '';
  const seen = {}; for (let d = 0; d < N; d++) { const s = slice(row, d); seen[s] = (seen[s] || 0) + 1; }
  for (const key in seen) { const s = key === '' ? [] : key.split(',').map(Number);
    if (s.some((i, k) => k !== r && k !== c && i > 0)) continue;
    const i = r === null ? 0 : s[r], j = c === null ? 0 : s[c];
    inside += `<rect x="${2 + j * w / nc}" y="${18 + i * h / nr}" width="${w / nc}" height="${h / nr}" data-s="${key}"
      ${line} fill="${colour(row, s)}"><title>${range(row, s)}\\n`
      + `on ${seen[key] > 1 ? seen[key] + ' devices' : 'one device'}`
      + '</title></rect>'; }
  const name = k => k === null ? '' : `${row.axes?.[k] ?? 'dimension ' + k} ${row.shape[k]}`;
  inside += `<text x="2" y="11">${name(c)}</text>`;
  if (r !== null) inside += `<text x="${w + 8}" y="${18 + h / 2 + 4}">${name(r)}</text>`;
  return [svg(w + 140, h + 24, inside), Object.values(seen)[0], Object.keys(seen).length]; }
const chip = name =>
  make('span', { className: 'chip', textContent: `${name} ${size[name]}`, style: `--h:${hue[name]}` });
function dims(row) { const e = make('span', { className: 'dims' });
  row.shape.forEach((n, k) => { if (k) e.append(make('i', { textContent: ' × ' }));
    e.append(make('span', { textContent: n, title: row.axes?.[k] ?? '' }));
    for (const name of row.split[k]) e.append(' ', chip(name)); });
  if (!row.shape.length) e.append('scalar'); return e; }
function choose(row, button) {
  document.querySelectorAll('.row.on').forEach(e => e.classList.remove('on'));
  button?.classList.add('on'); current = row; mesh(row);
  const [picture, copies, slices] = array(row), what = $('what');
  what.replaceChildren(make('b', { textContent: row.path }), ' ', make('span', { textContent: row.kind }), make('br'),
    dims(row));
  const said = slices === 1 ? `every device holds all of it, ${bytes(row.nbytes)}` :
    `${slices} slices of ${bytes(row.nbytes)}, ` + (copies > 1 ? `each on ${copies} devices` : 'each on one device');
  what.append(make('p', { textContent: said + (row.copies > 1 ? `; ${row.copies} such arrays, one a layer` : '')
    + (row.host ? '; in the memory of the host' : '') }), make('div', { innerHTML: picture }));
}
document.querySelector('.top').addEventListener('mouseover', event => {
  const s = event.target.dataset?.s;
  for (const e of document.querySelectorAll('.top rect'))
    e.classList.toggle('hot', current !== null && s !== undefined && e.dataset.s === s);
});
function draw(found) {
  const table = $('table'), open = found.length < rows.length; table.replaceChildren();
  let first = null;
  for (const kind of KINDS) {
    const mine = found.filter(row => row.kind === kind); if (!mine.length) continue;
    const total = list => bytes(list.reduce((n, row) => n + row.nbytes, 0));
    const folder = (name, list, level) => { const e = make('details', { open: open || level < 2 || list.length < 8 },
      make('summary', {}, name, make('small', { textContent: `${total(list)} · ${list.length}` }))); return e; };
    const top = folder(kind, mine, kind === 'optimizer' ? 9 : 0); top.className = 'kind'; table.append(top);
    const most = Math.max(...mine.map(row => row.nbytes));
    const fill = (into, list, depth) => {
      const below = new Map();
      for (const row of list) { const name = row.names.length > depth + 1 ? row.names[depth] : null;
        below.set(name ?? row, [...(below.get(name ?? row) ?? []), row]); }
      for (const [key, inside] of below) {
        if (typeof key === 'string' && inside.length > 1) {
          const e = folder(key, inside, depth + 1); into.append(e); fill(e, inside, depth + 1); continue; }
        for (const row of inside) {
          const button = make('button', { className: 'row', onclick: () => choose(row, button) },
            make('span', { textContent: row.names.slice(depth).join('/') }),
            make('small', { textContent: row.axes?.map(a => a ?? '·').join(' × ') ?? '' }), dims(row),
            make('small', { className: 'kind',
              textContent: row.dtype + (row.copies > 1 ? `, ${row.copies} times` : '') }),
            make('span', { className: 'share' }, make('i', { style: `width:${100 * row.nbytes / most}%` })),
            make('span', { className: 'size', textContent: bytes(row.nbytes) }));
          into.append(button);
          const more = first && row.kind === first[0].kind && row.split.flat().length > first[0].split.flat().length;
          if (!first || more) first = [row, button]; } } };
    fill(top, mine, 0); }
  return first; }
$('search').oninput = ({ target: { value } }) => draw(rows.filter(row =>
  row.path.includes(value) || row.kind.includes(value) || row.split.flat().includes(value)));
const first = draw(rows);
first ? choose(...first) : mesh(null);
"""


def html(layout: Any) -> str:
    """The layout as an HTML page."""
    title = escape(layout.title or "layout")
    free = [hue for hue in range(20, 360, 37) if hue not in HUES.values()]
    hues = HUES | {a: free[k % len(free)] for k, a in enumerate(a for a in layout.mesh.axis_names if a not in HUES)}
    data = {
        "axes": [{"name": name, "size": size, "hue": hues[name]} for name, size in layout.mesh.shape.items()],
        "rows": [_row(row, layout.mesh) for row in layout.rows],
    }
    chips = " ".join(
        f'<span class="chip" data-axis="{escape(name)}" style="--h:{hues[name]}" title="{escape(AXES.get(name, ""))}">'
        f"{escape(name)} {size}</span>"
        for name, size in layout.mesh.shape.items()
    )
    said = "".join(f"<p>{escape(line)}</p>" for line in (layout.totals, *layout.notes))
    script = f"const LAYOUT = {_json(data)}, KINDS = {_json(rows.KINDS)};{_SCRIPT}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE.replace('FONT', FONT)}</style></head><body><h1>{title}</h1>{said}"
        f'<div class="top"><div><h2>{layout.mesh.size} devices {chips}</h2><div id="mesh"></div></div>'
        '<div id="what"></div></div>'
        '<input id="search" type="search" placeholder="part of a path, or a mesh axis" aria-label="search">'
        f'<div id="table"></div><script>{script}</script></body></html>\n'
    )


def _row(row: Any, mesh: Any) -> dict[str, Any]:
    return {
        "kind": row.kind, "path": row.path, "names": row.path.split("/"), "shape": row.shape, "axes": row.axes,
        "split": rows.split(row, mesh), "dtype": row.dtype, "nbytes": row.nbytes, "copies": row.copies,
        "host": row.host,
    }  # fmt: skip


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
