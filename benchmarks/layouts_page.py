"""Write the tables and pictures of docs/parallelism.md from the results of `python -m benchmarks.layouts`."""

from pathlib import Path
from typing import Any

from benchmarks.layouts import BATCH, LAYOUTS, ROOT, SIZES

BEGIN, END = "<!-- measured: {} -->", "<!-- end of measured -->"

SIGNS = {"=": "", ">=": "≥ ", "<=": "≤ ", "~": "~ "}


def write(found: dict[str, Any], docs: Path = ROOT / "docs") -> None:
    """Write the tables into the page, and draw a picture for each layout."""
    page = docs / "parallelism.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name in LAYOUTS:
        (docs / f"layout-{name}.svg").write_text(picture(name), encoding="utf-8")


def filled(text: str, found: dict[str, Any]) -> str:
    """The text of the page with new tables between its markers."""
    for name in LAYOUTS:
        begin = BEGIN.format(name)
        head, marked, rest = text.partition(begin)
        if not marked:
            raise ValueError(f"the page has no line {begin}")
        text = f"{head}{begin}\n\n{section(name, found)}\n\n{END}{rest.partition(END)[2]}"
    return text


def section(name: str, found: dict[str, Any]) -> str:
    """The tables of a layout, one for each platform, in Markdown."""
    measured = {platform: found.get(platform, {}).get("layouts", {}) for platform in ("cpu", "tpu")}
    return "\n\n".join(table(platform, some[name]) for platform, some in measured.items() if name in some)


def table(platform: str, one: dict[str, Any]) -> str:
    """A layout's collectives in Markdown."""
    where = "8 simulated CPU devices" if platform == "cpu" else "16 chips of TPU v5e"
    lines = [
        f"| {where}, `{one['mesh']}` | over | times a step | of them overlapped | sent by a device |",
        "|---|---|---:|---:|---:|",
    ]
    for row in one["collectives"]:
        times = f"{SIGNS[row['bound']]}{row['times']}"
        lines.append(f"| {row['kind']} | {' + '.join(row['axes'])} | {times} | {row['asynchronous']} | "
                     f"{size(row['sent'])} |")  # fmt: skip
    sent = sum(row["sent"] for row in one["collectives"])
    return "\n".join([*lines, f"| *a device holds {size(one['held'])} between steps* | | | | **{size(sent)}** |"])


def size(count: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def models() -> str:
    """The sizes of the compiled models, in words."""
    said = []
    for platform, where in (("cpu", "8 CPU devices in float32"), ("tpu", "16 TPU chips in bfloat16")):
        sizes, (rows, length) = SIZES[platform], BATCH[platform]
        said.append(f"{where}: width {sizes['width']}, {sizes['depth']} blocks, {sizes['vocabulary']} tokens in the "
                    f"vocabulary, batches of {rows} x {length}")  # fmt: skip
    return "; ".join(said)


# ---- the pictures: what each of eight devices holds of a kernel, its momentum, and the data --------------------------

CELL, GAP, ICON = 92, 10, 34

STYLE = """text { font: 11px ui-sans-serif, system-ui, Helvetica, Arial, sans-serif; fill: #55606b }
.box { fill: none; stroke: #a9b4bf } .no { fill: #8b98a5; fill-opacity: .16 } .W { fill: #2f9e63 } .m { fill: #d98a1f }
.x { fill: #2f7fc4 } .h { fill: #8a56c8 } @media (prefers-color-scheme: dark) { text { fill: #a3afbb } }"""

SAID = {"W": "kernel", "m": "momentum", "x": "batch × length", "h": "batch × hidden"}


def held(name: str) -> tuple[Any, dict[str, Any]]:
    """The mesh of eight devices, and the sharding and shape of each array in the picture, by its letter in `SAID`."""
    from sapwood.core.param import Param, Stacked
    from sapwood.parallel import moment_shardings, param_shardings, placement
    from sapwood.parallel.meshes import abstract

    layout = LAYOUTS[name]
    mesh = abstract(layout.cpu)
    axes, shape, stacked = ("embed", "mlp"), (512, 2048), ()
    if name == "expert":
        axes, shape = ("expert", *axes), (8, *shape)
    if name == "pipeline":
        axes, shape, stacked = ("layers", *axes), (8, *shape), (Stacked(1, 8, "layers"),)
    spec = {"w": Param(shape, "float32", None, axes, stacked)}
    place = placement(mesh, layout.rules)
    found = {
        "W": (param_shardings(spec, mesh, layout.rules)["w"], shape),
        "m": (moment_shardings(spec, mesh, layout.rules)["w"], shape),
        "x": (place(("batch", "length"), (512, 512)), (512, 512)),
        "h": (place(("batch", "mlp"), (512, 2048)), (512, 2048)),
    }
    if name in ("pipeline", "sequence", "ulysses"):  # a stream of micro-batches; what has a length, which is split
        del found["h"]
    return mesh, found


def picture(name: str) -> str:
    """The picture of a layout as SVG: devices in two rows, each with the part of every array that it holds."""
    mesh, found = held(name)
    per_row = mesh.size // 2
    width, height = per_row * (CELL + GAP) + GAP, 2 * (CELL + 22 + GAP) + 34
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
           f"<style>{STYLE}</style><title>{name}: what each of eight devices holds</title>"]  # fmt: skip
    for device in range(mesh.size):
        x, y = GAP + device % per_row * (CELL + GAP), GAP + device // per_row * (CELL + 22 + GAP) + 14
        at = coordinates(mesh, device)
        out.append(f'<text x="{x}" y="{y - 4}">{", ".join(f"{axis} {at[axis]}" for axis in at)}</text>'
                   f'<rect class="box" x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="7"/>')  # fmt: skip
        for k, (letter, (sharding, shape)) in enumerate(found.items()):
            left, top = x + 8 + k % 2 * (ICON + 8), y + 8 + k // 2 * (ICON + 8)
            out.append(icon(letter, sharding, shape, at, left, top))
    x = GAP
    for letter in found:
        out.append(f'<rect class="{letter}" x="{x}" y="{height - 19}" width="11" height="11" rx="2"/>'
                   f'<text x="{x + 15}" y="{height - 9}">{SAID[letter]}</text>')  # fmt: skip
        x += 20 + 7 * len(SAID[letter]) + 10
    return "".join(out) + "</svg>\n"


def coordinates(mesh: Any, device: int) -> dict[str, int]:
    """The index of a device along each mesh axis."""
    at = {}
    for axis, size in reversed(mesh.shape.items()):
        device, at[axis] = divmod(device, size)
    return dict(reversed(at.items()))


def icon(letter: str, sharding: Any, shape: tuple[int, ...], at: dict[str, int], x: float, y: float) -> str:
    """An array as a square with the device's part colored.

    Two dimensions are shown: the first, and the one of the others that is split most.
    """
    from sapwood.parallel.place_activations import split_over

    parts = []
    for dim in range(len(shape)):
        place, of = 0, 1
        for axis in split_over(sharding, dim):
            place, of = place * sharding.mesh.shape[axis] + at[axis], of * sharding.mesh.shape[axis]
        parts.append((place, of))
    if len(parts) > 2:
        parts = [parts[0], max(parts[1:], key=lambda part: part[1])]
    (i, n), (j, m) = parts
    return (f'<rect class="no" x="{x}" y="{y}" width="{ICON}" height="{ICON}" rx="3"/>'
            f'<rect class="{letter}" x="{x + j * ICON / m:.1f}" y="{y + i * ICON / n:.1f}" width="{ICON / m:.1f}" '
            f'height="{ICON / n:.1f}" rx="1.5"/>')  # fmt: skip
