"""How time and memory of a training step grow with the sizes of a small transformer: exponents, fitted and of theory.

One size is doubled repeatedly while the others stay constant. The exponent is the slope of the least-squares line
through the logarithms. Terms of lower order make it lower than the theory's exponent. A higher exponent shows a cost
that grows faster than it should. The page of the results shows the first line of this text.
"""

import os
import time
from pathlib import Path

import numpy as np

from benchmarks.memory import peak

BASE = {"batch": 8, "width": 128, "layers": 2, "tokens": 128, "heads": 4, "vocabulary": 256}
AXES = {
    "batch": (8, 16, 32, 64),
    "width": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16),
    "tokens": (128, 256, 512, 1024),
    "devices": (1, 2, 4, 8),
}
BESIDE = {"devices": {"batch": 64}}
"""Sizes that replace those of `BASE` while an axis grows. For devices: eight examples each, else a step only waits."""
THEORY = {"batch": 1, "width": 2, "layers": 1, "tokens": 2, "devices": 0}
"""Exponents that neither time nor bytes may exceed.

Matrices are width by width, and attention is length by length. Simulated devices share the machine's cores, so the
total work must not grow with them.
"""
SLACK = 0.1
"""How far a fitted exponent may exceed the theory's, for noise in timing."""


def exponent(xs, ys) -> float:
    """The exponent of a power law: the slope of the least-squares line through the logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def measure(rounds: int, tell) -> dict:
    """Seconds of each round and bytes, by axis and value. Devices share one global batch; bytes are their sum."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    found: dict = {}
    for axis, values in AXES.items():
        found[axis] = []
        for value in values:
            sizes = {**BASE, **BESIDE.get(axis, {}), axis: value}
            seconds, count = step(sizes, rounds)
            found[axis].append({"value": value, "seconds": seconds, "bytes": count})
        tell(f"growth: {axis}, time ^{fits(found)[axis][0]:.2f}, bytes ^{fits(found)[axis][1]:.2f}")
    return found


def step(sizes: dict, rounds: int) -> tuple[list[float], int]:
    """The seconds of ``rounds`` training steps of the transformer, and their peak bytes summed over devices."""
    import jax
    import optax

    import sapwood as sw
    from sapwood import layers as L
    from sapwood.runtime import compile_options

    def block(v, x):
        x = x + L.MultiHeadAttention(sizes["heads"], causal=True)(v.attention, L.LayerNorm()(v.norm1, x))
        h = jax.nn.gelu(L.Dense(4 * sizes["width"])(v.up, L.LayerNorm()(v.norm2, x)))
        return x + L.Dense(sizes["width"])(v.down, h)

    def model(v, tokens):
        x = L.Embed(sizes["vocabulary"], sizes["width"])(v.embed, tokens)
        x = L.Scan(block, sizes["layers"])(v.blocks, x)
        return L.Dense(sizes["vocabulary"])(v.head, L.LayerNorm()(v.norm, x))

    devices = sizes.get("devices", 1)
    mesh = sw.mesh(f"fsdp={devices}", devices=jax.devices()[:devices]) if devices > 1 else None
    trainer = sw.Trainer(sw.supervised(model, inputs="tokens", target="targets"), optax.adam(1e-3), mesh=mesh)
    tokens = np.random.default_rng(0).integers(0, sizes["vocabulary"], (sizes["batch"], sizes["tokens"] + 1), "int32")
    batch = trainer.put({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    state = trainer.init(0, batch)
    compiled = compile_options.compiled(jax.jit(trainer.step, donate_argnums=0).trace(state, batch), trainer.platform)
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:], devices * peak(compiled)


def fits(found: dict) -> dict[str, tuple[float, float]]:
    """The exponents of time and bytes, by axis. The fastest round is used, since noise only adds time."""
    out = {}
    for axis, rows in found.items():
        if len(rows) > 1:
            xs = [row["value"] for row in rows]
            out[axis] = exponent(xs, [min(row["seconds"]) for row in rows]), exponent(xs, [r["bytes"] for r in rows])
    return out


def tables(found: dict) -> list[list[list[str]]]:
    rows = [["doubled", "from, to", "time", "bytes", f"theory, at most ({SLACK:g} more for noise)", "goal"]]
    for axis, (seconds, count) in fits(found).items():
        met = max(seconds, count) <= THEORY[axis] + SLACK
        values = [row["value"] for row in found[axis]]
        rows.append([axis, f"{values[0]} to {values[-1]}", f"{axis}^{seconds:.2f}", f"{axis}^{count:.2f}",
                     f"{axis}^{THEORY[axis]}", "met" if met else "not met"])  # fmt: skip
    return [rows]


def draw(found: dict, path: Path) -> None:
    """Draw a panel for each axis, log-log: time and bytes relative to the smallest value, and the theory's line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "0"}):
        figure, axes = plt.subplots(1, len(found), figsize=(12, 3.1), layout="constrained")
        for axis, (name, rows), (time_, bytes_) in zip(axes, found.items(), fits(found).values(), strict=True):
            xs = np.array([row["value"] for row in rows])
            for ys, slope, colour, what in (
                ([min(row["seconds"]) for row in rows], time_, "#3f7d4e", "time"),
                ([row["bytes"] for row in rows], bytes_, "#4a6fa5", "bytes"),
            ):
                axis.plot(xs, np.array(ys) / ys[0], "o-", color=colour, markersize=4.5, label=f"{what} ^{slope:.2f}")
            axis.plot(
                xs, (xs / xs[0]) ** THEORY[name], "--", color="#b5482f", linewidth=1, label=f"theory ^{THEORY[name]}"
            )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_xticks(xs, [str(x) for x in xs])
            axis.set_title(name, loc="left", fontweight="bold", fontsize=9.5)
            axis.legend(frameon=False, fontsize=8)
            axis.grid(color="#e4e0d6", linewidth=0.7)
            axis.spines[["top", "right"]].set_visible(False)
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, 0.5), max(high, 2))  # so that what does not grow looks it
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        plt.close(figure)
