"""Host memory between steps, for training on a CPU: what one step frees, the next one takes again.

XLA asks malloc for the temporaries of a step in one piece and gives them back at its end. The GNU C library hands a
piece of that size to the kernel every time, which takes it apart and zeroes it again, page by page: a tenth of the step
of a small transformer. So where we train on a CPU, malloc is told to keep what is freed.
"""

import ctypes
import glob
import os
import sys

import jax

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Parameters of mallopt(3)."""

KEEP = {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}

ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA GPUs, TPUs, AMD GPUs, and of GPUs within WSL."""


def keep() -> bool:
    """Have malloc keep freed memory for the rest of the process; says whether it was told to.

    Only on a CPU under the GNU C library, and not where the environment sets malloc up (`MALLOC_ARENA_MAX` and the
    like, `GLIBC_TUNABLES`). It works where JAX has not been used yet: threads that have a heap of their own go on as
    before.

    >>> keep() in (True, False)
    True
    """
    if not sys.platform.startswith("linux") or not on_cpu():
        return False
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    told = [mallopt is not None and mallopt(name, value) for name, value in KEEP.items()]
    return all(told)


def on_cpu() -> bool:
    """Whether JAX computes on a CPU, found without starting it: its threads would take heaps of their own.

    Malloc forgets nothing it was told, and the many threads that read data for an accelerator would wait for each
    other in one heap; so where there may be one, the answer is no, unless JAX was told to leave it alone.
    """
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    return chosen.split(",")[0] == "cpu" if chosen else not any(map(glob.glob, ACCELERATORS))
