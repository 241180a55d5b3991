"""`Work`: the files that the parent prepares for a race and each child reads: initial weights, examples, batches."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite import Suite

ROOT = Path(__file__).resolve().parent.parent


class Work:
    """The files of one race in a directory.

    ``weights`` holds the initial weights as nested dicts. ``data`` holds the examples as `fit` takes them. ``batches``
    is the first epoch that ``fit(seed=0)`` makes of the examples, as arrays of shape `(epoch, batch, ...)`.
    """

    def __init__(self, suite: Suite, system: str, directory: Path):
        self.suite, self.system, self.directory = suite, system, Path(directory)
        self.config = suite.config

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        with np.load(self.directory / "weights.npz") as file:
            for path in file.files:
                *scopes, name = path.split("/")
                inner = tree
                for scope in scopes:
                    inner = inner.setdefault(scope, {})
                inner[name] = file[path]
        return tree

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / "data.npz") as file:
            return dict(file)

    @functools.cached_property
    def batches(self) -> dict[str, np.ndarray]:
        order = np.load(self.directory / "order.npy")
        return {name: values[order] for name, values in self.data.items()}

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The batches of the epoch in order, as (inputs, target)."""
        inputs, target = self.batches.values()
        return list(zip(inputs, target, strict=True))


def prepare(suite: Suite, directory: Path) -> None:
    """Write the files of a race."""
    if suite.weights is not None:
        tree = suite.weights(np.random.default_rng(0), suite.config)
        np.savez(directory / "weights.npz", **dict(_leaves(tree)))
    if suite.data is not None:
        import sapwood.data

        data = suite.data(np.random.default_rng(1), suite.config)
        np.savez(directory / "data.npz", **data)
        stream = sapwood.data.batches(sapwood.data.load(data), suite.batch_size, seed=0)
        order = np.stack([stream.indices(step) for step in range(min(suite.epoch, stream.steps_per_epoch))])
        np.save(directory / "order.npy", order)
    if suite.prepare is not None:
        suite.prepare(directory)


def _leaves(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
