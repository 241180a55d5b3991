"""The systems, one library a file. Each has a function for each model it can build: ``mlp(work) -> Job`` and so on."""

import importlib

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
    """The job of a race's system; "sapwood-step" is in sapwood.py, "floor again" in floor.py."""
    name = work.system.removesuffix(" again").partition("-")[0]
    return getattr(importlib.import_module(f"benchmarks.systems.{name}"), work.suite.model)(work)
