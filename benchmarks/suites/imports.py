"""`import`: the time to import a library in a new process. All libraries but PyTorch import JAX too."""

import importlib
import time

from benchmarks.suite import AGAIN, FLOOR, PEERS, Suite, beats

MODULES = {FLOOR: "jax", AGAIN: "jax", "sapwood": "sapwood", "linen": "flax.linen", "nnx": "flax.nnx"}


def once(work):
    name = MODULES.get(work.system, work.system)
    begin = time.perf_counter()
    importlib.import_module(name)
    return {"seconds": {"import": time.perf_counter() - begin}}


SUITES = (
    Suite(
        "import",
        "importing the library; the floor is JAX alone",
        systems=(FLOOR, AGAIN, "sapwood", *PEERS[:-1]),
        once=once,
        measures=("import",),
        rounds=10,
        goals=beats("sapwood", *PEERS[:-1]),
    ),
)
