"""The systems, one library a file. Each has a function for each model it can build: ``mlp(work) -> Job`` and so on."""

import importlib

FILES = {"floor again": "floor", "torch-compile": "torch"}
"""The file of a system, where its name does not say it; "sapwood-step" is in sapwood.py, and so on."""
NEEDS = {
    "linen": "flax",
    "nnx": "flax",
    "haiku": "haiku",
    "equinox": "equinox",
    "keras": "keras",
    "torch": "torch",
    "torch-compile": "torch",
}
"""What must be installed for a system."""


def build(work):
    """The job of a race's system."""
    name = FILES.get(work.system) or work.system.split("-")[0]
    return getattr(importlib.import_module(f"benchmarks.systems.{name}"), work.suite.model)(work)
