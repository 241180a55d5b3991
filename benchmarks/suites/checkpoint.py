"""`checkpoint`: saving and restoring 100 million float32 parameters (400 MB); the floor is Orbax alone.

Each process saves once and restores once. So late imports and compilations of a library count, and files are read from
the page cache. Orbax and PyTorch verify nothing; Sapwood's time includes the digest of every array.
"""

import os
import shutil
import time

import numpy as np

from benchmarks.suite import Suite, beats

SHAPE, COUNT = (2048, 2048), 24  # 100,663,296 parameters


def once(work):
    path = work.directory / f"of {work.system}"
    arrays = {f"layer{i}": np.random.default_rng(i).random(SHAPE, "float32") for i in range(COUNT)}
    os.sync()  # what the one before has written goes to the disk now, not while this one is timed
    try:
        return {"seconds": WAYS[work.system.removesuffix(" again")](arrays, path)}
    finally:
        shutil.rmtree(path, ignore_errors=True)


def timed(save, restore, ready):
    """Seconds of saving until all is on disk, and of restoring until all is in memory. `ready` checks the arrays."""
    begin = time.perf_counter()
    save()
    saved = time.perf_counter()
    back = restore()
    done = time.perf_counter()
    assert ready(back)
    return {"save": saved - begin, "restore": done - saved}


def orbax(arrays, path):
    import jax
    import orbax.checkpoint as ocp

    tree = jax.block_until_ready(jax.device_put(arrays))
    checkpointer = ocp.StandardCheckpointer()

    def save():
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()

    return timed(save, lambda: jax.block_until_ready(checkpointer.restore(path, tree)), lambda b: same(arrays, b))


def sapwood(arrays, path):
    import jax
    import orbax.checkpoint  # noqa: F401

    from sapwood.saving.checkpoints import Checkpoints

    tree = jax.block_until_ready(jax.device_put(arrays))

    def save():
        with Checkpoints(path) as checkpoints:
            checkpoints.save(1, tree, {})

    return timed(save, lambda: jax.block_until_ready(Checkpoints(path).restore(tree)[0]), lambda b: same(arrays, b))


def torch(arrays, path):
    import torch

    tree = {name: torch.from_numpy(value) for name, value in arrays.items()}
    path.mkdir()
    file = path / "weights.pt"
    return timed(lambda: torch.save(tree, file), lambda: torch.load(file), lambda b: same(arrays, b))


def same(arrays, back):
    return all(np.array_equal(np.asarray(back[name]), value) for name, value in arrays.items())


WAYS = {"orbax": orbax, "sapwood": sapwood, "torch": torch}

SUITES = (
    Suite(
        "checkpoint",
        "saving and restoring 100 M float32 parameters; the floor is Orbax alone",
        systems=("orbax", "orbax again", "sapwood", "torch"),
        once=once,
        measures=("save", "restore"),
        rounds=7,
        goals=(*beats("sapwood", "orbax", "torch", measure="save"),
               *beats("sapwood", "orbax", "torch", measure="restore")),
    ),
)  # fmt: skip
