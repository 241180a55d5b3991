"""The cost of a digest of arrays (rule 2) compared with the digest of Sapwood 0.1 (rule 1).

    python -m benchmarks.digest [--rounds 30]

Prints, for host and device by shape and dtype, the throughput of rule 2 in GB/s and its processor time relative to rule
1. Rule 1 is also compared with itself, which shows the noise. Each round runs every rule once; ratios are ratios of
medians over rounds. Writes `benchmarks/results/digest.json`.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sapwood.saving import digest

ON_DEVICE = [("float32", (4096, 4096)), ("float32", (1 << 24,)), ("float32", (3, 3, 1024, 1024)),
             ("bfloat16", (4096, 4096)), ("int8", (4096, 4096))]  # fmt: skip
ON_HOST = [("float32", (1024, 1024)), ("float32", (1 << 20,)), ("bfloat16", (1024, 1024)), ("float32", (64, 64))]
RULES = {"rule 1": 1, "rule 1 again": 1, "rule 2": 2}


def on_device(x: jax.Array, rule: int) -> None:
    jax.block_until_ready(digest._device_lanes(x, digest._tables(x, rule), rule))


def on_host(x: np.ndarray, block: int, rule: int) -> None:
    digest._BLOCK = 1 << 40 if rule == 1 else block  # 0.1 did all at once
    digest._host_lanes(x, rule)
    digest._BLOCK = block


def raced(where: str, dtype: str, call: Callable[..., None], x: Any, rounds: int) -> dict[str, Any]:
    """One row of the table: time `call(x, rule=...)` for each rule, in turns."""
    times: dict[str, list[float]] = {name: [] for name in RULES}
    fastest = float("inf")
    for i in range(rounds + 1):
        for name, rule in RULES.items():
            begun, clock = time.process_time(), time.perf_counter()
            call(x, rule=rule)
            if i > 0:  # the first compiles
                times[name].append(time.process_time() - begun)
                fastest = min(fastest, time.perf_counter() - clock) if rule == 2 else fastest
    again, new = (
        round(statistics.median(times[name]) / statistics.median(times["rule 1"]), 3) for name in list(RULES)[1:]
    )
    row = {"where": where, "dtype": dtype, "shape": list(x.shape), "GB/s": round(x.nbytes / fastest / 1e9, 2)}
    return row | {"rule 1 again": again, "rule 2": new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rows = []
    for where, shapes in (("device", ON_DEVICE), ("host", ON_HOST)):
        for dtype, shape in shapes:
            x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
            call = on_device if where == "device" else functools.partial(on_host, block=digest._BLOCK)
            rows.append(raced(where, dtype, call, x if where == "device" else np.asarray(x), options.rounds))
            print(rows[-1], flush=True)
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
    (Path(__file__).parent / "results" / "digest.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
