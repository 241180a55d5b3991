"""`deep`: 48 narrow transformer blocks, where compiling costs more than computing.

The races are: from the start of the process to the end of the first step (scanned, and with blocks compiled one by
one); tracing and compiling at 12, 48 and 96 blocks; the scanned step against the unrolled one; and the start of `gpt`
with compiled programs kept on disk.
"""

import time

from benchmarks.suite import Goal, Suite, beats
from benchmarks.suites import gpt

CONFIG = {"layers": 48, "width": 64, "heads": 4, "tokens": 64, "vocabulary": 256, "batch": 4, "rate": 1e-3}


def start(work):
    """Run the first step. Each system loads the given initial weights in its own way."""
    from benchmarks.systems import build

    return {"seconds": {}, "losses": build(work).losses(1)}


def compile_at(work):
    """Trace and compile the step. The number of blocks is the end of the system's name."""
    import jax

    from benchmarks.systems import build
    from sapwood.runtime import compile_options

    depth = int(work.system.removesuffix(" again").rpartition("-")[2])
    blocks = list(work.weights["blocks"].values())
    work.weights["blocks"] = {str(i): blocks[i % len(blocks)] for i in range(depth)}
    work.config = {**work.config, "layers": depth}
    job = build(work)
    batch = {name: values[0] for name, values in work.batches.items()}
    begin = time.perf_counter()
    lowered = jax.jit(job.trainer.step, donate_argnums=0).lower(job.state, batch)
    traced = time.perf_counter()
    lowered.compile(compile_options.options(job.trainer.platform) or None)  # as `fit` does
    done = time.perf_counter()
    return {"seconds": {"trace + compile": done - begin, "trace": traced - begin, "compile": done - traced}}


def start_cached(work):
    """Run the first step; for "sapwood-cached" with `fit(compile_cache=...)`, which the warm-up round has filled."""
    from benchmarks.systems import build

    job = build(work)
    if "cached" in work.system:
        job.options = {"compile_cache": str(work.directory / "cache")}
    return {"seconds": {}, "losses": job.losses(1)}


COMMON = dict(model="gpt", config=CONFIG, weights=gpt.weights, data=gpt.data, batch_size=4)
SCANNED = ("linen-scan", "torch")
"""Systems that start within seconds: a scanned stack, and one that compiles nothing."""
UNROLLED = ("linen", "nnx", "haiku", "equinox", "keras", "torch-compile")

SUITES = (
    Suite(
        "deep-start",
        "48 blocks of width 64: from the start of the process to the first step done",
        systems=("floor-scan", "floor-scan again", "sapwood-scan", *SCANNED),
        once=start,
        measures=("process",),
        rounds=5,
        goals=tuple(Goal("sapwood-scan", other, 0.5) for other in SCANNED),
        **COMMON,
    ),
    Suite(
        "deep-unrolled",
        "the same, where each block is compiled anew",
        systems=("floor-scan", "floor-scan again", "sapwood-scan", "floor", "sapwood-unrolled", *UNROLLED),
        once=start,
        measures=("process",),
        rounds=2,
        goals=tuple(Goal("sapwood-scan", other, 0.5) for other in UNROLLED),
        **COMMON,
    ),
    Suite(
        "deep-compile",
        "width 64: tracing and compiling the step, scanned or unrolled, by the number of blocks",
        systems=("sapwood-scan-12", "sapwood-scan-12 again", "sapwood-scan-48", "sapwood-scan-96",
                 "sapwood-unrolled-12"),
        once=compile_at,
        measures=("trace + compile", "trace", "compile"),
        rounds=5,
        goals=(Goal("sapwood-scan-96", "sapwood-scan-12", 1.15),),
        **COMMON,
    ),
    Suite(
        "deep-step",
        "48 blocks of width 64: the step scanned against the step unrolled",
        systems=("sapwood-step-unrolled", "sapwood-step-unrolled again", "sapwood-step-scan", "linen", "linen-scan"),
        steps=4,
        goals=(Goal("sapwood-step-scan", "sapwood-step-unrolled", 1.05), *beats("sapwood-step-scan", "linen-scan")),
        floors={"linen-scan": "linen"},
        **COMMON,
    ),
    Suite(
        "gpt-start",
        "gpt: from the start of the process to the first step done, compiled programs kept on disk or not",
        systems=("floor", "floor again", "sapwood", "sapwood-cached"),
        once=start_cached,
        measures=("process",),
        rounds=5,
        goals=(Goal("sapwood-cached", None, 3.0),),
        model="gpt",
        config=gpt.CONFIG,
        weights=gpt.weights,
        data=gpt.data,
        batch_size=4,
        tolerance=gpt.SUITES[0].tolerance,
    ),
)  # fmt: skip
