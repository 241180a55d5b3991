"""Host memory between steps, for training on a CPU: what one step frees, the next one takes again.

XLA asks malloc for the temporaries of a step in one piece and gives them back at its end. The GNU C library hands a
piece of that size to the kernel every time, which takes it apart and zeroes it again, page by page: a third of the step
of a small convolutional net, a quarter of a small transformer's. So a program that trains on a CPU is compiled to ask
for pieces that a heap of malloc's holds, and malloc is told to keep what is freed.

Each thread has a heap of its own, so threads do not wait for each other, which a step of 0.1 ms would notice.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import jax

from sapwood.core.jaxpr import equations

HEAP = 2**26
"""Bytes of a heap of a thread, and of all the values that can lie in it."""

LARGEST = int(0.9 * HEAP)
"""Bytes of the largest value, or of all temporaries in one, for which a heap of a thread has room."""

PIECE = 2**24
"""Bytes of a piece, at least: XLA packs values into one as long as they fit."""

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""

SHARE = 0.25
"""Of the memory, what may be kept: each thread that runs programs keeps the temporaries of one."""


def pieces(jaxpr: Any) -> dict[str, int]:
    """The compiler option that makes a program on a CPU ask for its temporaries in pieces.

    Empty where malloc would not keep those: it is not the GNU C library's, the environment sets it up
    (`MALLOC_ARENA_MAX` and the like, `GLIBC_TUNABLES`), or a value of the program, whole on a mesh, fills a heap.

    >>> pieces(jax.make_jaxpr(lambda x: x + 1)(jax.ShapeDtypeStruct((2**24,), "float32")).jaxpr)
    {}
    """
    largest = max((_bytes(e) for e in equations(jaxpr)), default=0)
    if _mallopt() is None or largest > LARGEST:
        return {}
    piece = max(PIECE, min(2 * largest, LARGEST))  # XLA complains of values that are larger
    return {"xla_multiheap_size_constraint_per_heap": piece}


def keep(temporaries: int) -> bool:
    """Have malloc keep the pieces of a program with so many bytes of temporaries, for the rest of the process: take all
    that fits into heaps, and give no heap back even if all of it is free.

    Not where all threads together would keep more than a quarter of the memory. Says whether malloc was told to.
    """
    mallopt = _mallopt()
    if mallopt is None or not fits(temporaries):
        return False
    most = mallopt(MMAP_THRESHOLD, HEAP) or mallopt(MMAP_THRESHOLD, HEAP // 2 - 1)  # before glibc 2.35
    return bool(most and mallopt(TOP_PAD, HEAP) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def fits(temporaries: int) -> bool:
    """Whether every thread may keep so many bytes, and malloc can be told to.

    >>> fits(2**60)
    False
    """
    return _mallopt() is not None and _threads() * temporaries <= SHARE * _memory()


def _mallopt() -> Any:
    """The function of the GNU C library; None where there is none, or malloc is set up already."""
    if not sys.platform.startswith("linux"):
        return None
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none


def _bytes(equation: Any) -> int:
    """Of the largest value that an equation makes. On a CPU, XLA computes in no less than 32 bits."""
    avals = [var.aval for var in equation.outvars]
    return max((a.size * max(4, a.dtype.itemsize) for a in avals if hasattr(a, "dtype")), default=0)


def _threads() -> int:
    """Threads that XLA runs programs in."""
    return max(len(os.sched_getaffinity(0)), jax.local_device_count())


def _memory() -> int:
    """Bytes of memory of this machine, or of the least of the control groups (v2, v1) that we are in."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                root = Path("/sys/fs/cgroup", kinds)
                groups = [root / path.lstrip("/"), *(root / path.lstrip("/")).parents]
                limits = [group / ("memory.limit_in_bytes" if kinds else "memory.max") for group in groups]
                said = [limit.read_text().strip() for limit in limits if limit.exists()]
                found += [int(number) for number in said if number.isdigit()]
    return min(found)
