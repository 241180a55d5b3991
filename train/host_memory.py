"""Host memory between steps, for training on a CPU: what one step frees, the next one takes again.

XLA asks malloc for the temporaries of a step in one piece and gives them back at its end. The GNU C library hands a
piece of that size to the kernel every time, which takes it apart and zeroes it again, page by page: a tenth of the step
of a small transformer. So where we train on a CPU, malloc is told to keep what is freed.
"""

import ctypes
import os
import sys

from sapwood.core.loop import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Parameters of mallopt(3)."""

KEEP = {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}
USUAL = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26, ARENA_MAX: 0}
"""What malloc comes to by itself where large pieces are freed."""


def keep() -> bool:
    """Have malloc keep freed memory for the rest of the process; says whether it was told to.

    Only on a CPU under the GNU C library, and not where the environment sets malloc up (`MALLOC_ARENA_MAX` and the
    like, `GLIBC_TUNABLES`). It works where JAX has not been used yet: threads that have a heap of their own go on as
    before.

    >>> keep() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    done = all([mallopt(name, value) for name, value in KEEP.items()])  # noqa: C419 - all of them, whatever they answer
    if platform() == "cpu":  # asked last: it starts JAX's threads
        return done
    for name, value in USUAL.items():
        mallopt(name, value)
    return False
