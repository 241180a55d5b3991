"""The systems of races, one file for each library.

Each file has a function for each model that it can build, such as ``mlp(work) -> Job``.
"""

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
"""The package that must be installed for each system."""


def build(work):
    """The job of a race's system. Its file is the name before "-" or " again": "sapwood-step" is in sapwood.py."""
    name = work.system.removesuffix(" again").partition("-")[0]
    return getattr(importlib.import_module(f"benchmarks.systems.{name}"), work.suite.model)(work)
