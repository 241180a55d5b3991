"""The race of `gpt` with about 350 million parameters on a GPU, in bfloat16, and its model FLOPs utilization.

    python benchmarks/gpu.py [--batch 16] [--rounds 5] [--peak TFLOPS] [--out FILE]

Needs `pip install ".[cuda]"` and, for the peer, a PyTorch built for CUDA. The rules are those of every race
(docs/benchmarks.md), one process at a time: same weights and batches, losses that agree, the floor twice. `Trainer.fit`
("sapwood") and its bare step are compared with the hand-written floor, which uses cuDNN attention too, and with
`torch.compile` under `autocast`.

Model FLOPs utilization is the share of the chip's peak that is spent on the operations of the model. For a token of a
training step these are

    6 x (weights of matrix products) + 6 x layers x width x tokens

The first term is two operations a weight forward and four backward. The second is attention: 12 x layers x width x
tokens, of which a causal mask leaves half. Embedding lookups and recomputation in kernels count nothing. The usual
formula, 6 x (all parameters) + 12 x layers x width x tokens (Chowdhery et al. 2022, arXiv:2204.02311, appendix B),
gives more; the result file has both. The peak is the published one for dense matrices. The result file also has the
measured speed of one large matrix product.

The goals: Sapwood reaches at least 50 % of the peak, and `torch.compile` takes at least 1.1 times as long. The result
is written to benchmarks/results/gpu.json. No GPU has been measured yet, so this file does not exist.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Run by its path, this file is not in the package; at the end, so that nothing of the root shadows a package.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.__main__ import RESULTS, machine, refuse
from benchmarks.race import Refused, available, installed, race
from benchmarks.ratios import Interval, interval
from benchmarks.suite import Suite
from benchmarks.suites.gpu import BATCHES, SIZES, made
from benchmarks.work import ROOT

PEAKS = {
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "A100": 312.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "T4": 65.0,
}
"""Peak speeds by chip in TFLOP/s, as NVIDIA publishes them.

They are for dense bfloat16 matrix products with float32 sums, which is half of the figure for sparse ones. The T4 has
no bfloat16; its figure is for float16. The first entry whose words are all in the chip's name is used.
"""

GOAL = 0.5
"""The goal: the least share of the peak."""


def arguments(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="350m", help="default: %(default)s; tiny is to try the script")
    parser.add_argument("--batch", type=int, help="sequences of a batch; default: 16, for a GPU of 80 GB; 4 for 24 GB")
    parser.add_argument("--against", default="floor,torch-compile", help="default: %(default)s; the floor always runs")
    parser.add_argument("--rounds", type=int, help="processes of each system; 5 by default")
    parser.add_argument("--peak", type=float, help="TFLOP/s of dense bfloat16 products, for a chip not in the table")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, for a GPU and size 350m alone")
    parser.add_argument("--anywhere", action="store_true", help="run where there is no GPU, too, to try the script")
    parser.add_argument("--chip", action="store_true", help=argparse.SUPPRESS)  # what a child is asked for
    options = parser.parse_args(words)
    options.batch = options.batch or BATCHES[options.size][0]
    options.against = tuple(options.against.split(","))
    if options.batch not in BATCHES[options.size]:
        refuse(f"--batch for {options.size} is one of {', '.join(map(str, sorted(BATCHES[options.size])))}")
    if not set(options.against) <= {"floor", "torch-compile"}:
        refuse(f"--against knows floor and torch-compile, not {','.join(options.against)}")
    if options.rounds is not None and options.rounds < 1:
        refuse("at least one round is expected")
    return options


def parameters(c) -> int:
    """The number of parameters of the model.

    >>> parameters(SIZES["350m"])
    353593344
    """
    width = c["width"]
    block = 12 * width**2 + 5 * width + 4 * width  # products; biases of the feed-forward part; two norms
    return c["layers"] * block + (2 * c["vocabulary"] + c["tokens"] + 2) * width


def flops_per_token(c) -> int:
    """The operations of a token in a training step, by the formula at the head of this file.

    >>> flops_per_token(SIZES["350m"])
    2113929216
    """
    weights = c["layers"] * 12 * c["width"] ** 2 + c["width"] * c["vocabulary"]
    return 6 * weights + 6 * c["layers"] * c["width"] * c["tokens"]


def usual_flops_per_token(c) -> int:
    """The operations of a token by the usual formula: all parameters count, and attention counts as if unmasked."""
    return 6 * parameters(c) + 12 * c["layers"] * c["width"] * c["tokens"]


def published(kind: str) -> float | None:
    """The published peak of a chip in TFLOP/s, by its name in JAX; None if it is not in the table.

    >>> published("NVIDIA H100 80GB HBM3"), published("NVIDIA L40S"), published("NVIDIA A100-SXM4-80GB MIG 3g.40gb")
    (989.5, None, None)
    """
    words = set(re.split(r"[ -]", kind))
    if words & {"MIG", "NVL"}:  # a part of a chip; a slower one of the same name
        return None
    return next((peak for name, peak in PEAKS.items() if set(name.split()) <= words), None)


def product(n: int, windows: int = 10, times: int = 50) -> float:
    """TFLOP/s of a product of two n x n matrices of normal numbers in bfloat16. The fastest of ``windows`` counts."""
    import jax

    a, b = (jax.random.normal(key, (n, n), "bfloat16") for key in jax.random.split(jax.random.key(0)))
    multiply = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready([multiply(a, b) for _ in range(3)])
    seconds = []
    for _ in range(windows):
        begin = time.perf_counter()
        for _ in range(times):
            last = multiply(a, b)
        jax.block_until_ready(last)
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 * times / min(seconds) / 1e12


def chip() -> dict:
    """This machine's device, PyTorch's device, and the measured speed of a matrix product."""
    import jax

    device = jax.devices()[0]
    torch = "none"
    if installed("torch-compile"):
        from torch import cuda

        torch = "cuda" if cuda.is_available() else "cpu"
    speed = product(8192 if device.platform == "gpu" else 256)
    return {"platform": device.platform, "name": device.device_kind, "torch": torch, "product": speed}


def ask_chip() -> dict:
    """The result of `chip` in a new process, since a process that has used a GPU keeps memory there."""
    child = subprocess.run([sys.executable, __file__, "--chip"], cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        refuse(f"JAX finds no device: {lines[-1] if lines else f'exit code {child.returncode}'}")
    return json.loads(child.stdout.splitlines()[-1])


def shares(suite: Suite, measured: dict, peak: float) -> dict[str, Interval]:
    """The share of a peak (in TFLOP/s) that each system reaches, over rounds."""
    work = flops_per_token(suite.config) * suite.config["batch"] * suite.config["tokens"] / 1e12
    rounds = measured["rounds"]
    taking_part = [system for system in suite.systems if any(system in r for r in rounds)]
    return {s: interval([work / r[s]["step"] / peak for r in rounds if s in r]) for s in taking_part}


def table(suite: Suite, measured: dict, peaks: dict[str, float]) -> list[list[str]]:
    """The table of the utilization of each system, header first, with a column for each named peak."""
    tokens = suite.config["batch"] * suite.config["tokens"]
    rows = [["system", "step", "tokens/s", "TFLOP/s", *(f"of the {name} peak" for name in peaks)]]
    found = {name: shares(suite, measured, peak) for name, peak in peaks.items()}
    for system, reached in shares(suite, measured, 1.0).items():
        step = statistics.median(r[system]["step"] for r in measured["rounds"] if system in r)
        of = [f"{found[name][system].median:.1%}" for name in peaks]
        rows.append([system, report.duration(step), f"{tokens / step:,.0f}", f"{reached.median:.3g}", *of])
    return rows


def verdict(suite: Suite, measured: dict, peaks: dict[str, float]) -> str:
    """The goal of utilization in words: of the published peak, or of the measured one if no published one is known."""
    name = next(iter(peaks))
    r = shares(suite, measured, peaks[name])["sapwood"]
    said = "met" if r.low >= GOAL else "not met"
    return f"sapwood at {r.median:.1%} ({r.low:.1%} to {r.high:.1%}) of the {name} peak, at least {GOAL:.0%}: {said}"


def hold(suite: Suite, systems: list[str], rounds: int) -> dict:
    """Run the race, with this process off the GPU, so that each child has the one GPU to itself.

    A compilation cache shared by all rounds compiles each program once.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True) as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        return race(suite, systems, rounds, available())


def main(words=None) -> int:
    options = arguments(words)
    if options.chip:
        print(json.dumps(chip()))
        return 0
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    here = ask_chip()
    if here["platform"] != "gpu" and not options.anywhere:
        refuse(f"no GPU: JAX sees {here['name']} ({here['platform']}); --size tiny --anywhere tries the script")
    suite = made(options.size, options.batch)
    peaks = {"published": options.peak or published(here["name"]), "measured": here["product"]}
    peaks = {name: peak for name, peak in peaks.items() if peak}
    print(heading(suite, peaks, here), flush=True)
    systems = [system for system in suite.systems if takes_part(system, options.against, here)]
    try:
        measured = hold(suite, systems, options.rounds or suite.rounds)
    except Refused as error:
        refuse(str(error), 1)
    print(report.text(suite, measured))
    print(report.plain(table(suite, measured, peaks)), verdict(suite, measured, peaks), sep="\n  ")
    out = options.out or (RESULTS / "gpu.json" if here["platform"] == "gpu" and options.size == "350m" else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result(suite, measured, peaks, here), indent=1) + "\n")
    return int(bool(measured["failed"]))


def heading(suite: Suite, peaks: dict[str, float], here: dict) -> str:
    """The line above the results: the chip, its peaks, and the size of the model."""
    said = ", ".join(f"{peak:.4g} TFLOP/s {name}" for name, peak in peaks.items())
    count, flops = parameters(suite.config), flops_per_token(suite.config)
    return f"{here['name']}, peak {said}; {count:,} parameters, {flops / 1e9:.4g} GFLOP a token"


def takes_part(system: str, against: tuple[str, ...], here: dict) -> bool:
    """True if a system takes part. PyTorch does if it was asked for and runs on the same kind of device as JAX."""
    if system != "torch-compile" or system not in against:
        return system != "torch-compile"
    if here["torch"] == ("cuda" if here["platform"] == "gpu" else "cpu"):
        return True
    print(f"left out: torch-compile (PyTorch here: {here['torch']}; JAX: {here['platform']})", file=sys.stderr)
    return False


def result(suite: Suite, measured: dict, peaks: dict[str, float], here: dict) -> dict:
    """The content of the result file."""
    c = suite.config
    return {
        "machine": {**machine(), "chip": here["name"], "platform": here["platform"]},
        "config": dict(c),
        "parameters": parameters(c),
        "flops_per_token": flops_per_token(c),
        "usual_flops_per_token": usual_flops_per_token(c),
        "peaks": peaks,
        "shares": {name: {s: r._asdict() for s, r in shares(suite, measured, p).items()} for name, p in peaks.items()},
        "goal": verdict(suite, measured, peaks),
        "race": measured,
    }


if __name__ == "__main__":
    sys.exit(main())
