"""Host memory for training on a CPU: a step reuses the memory that the previous step freed.

XLA allocates the temporaries of a step as one piece and frees it at the end of the step. The GNU C library returns a
piece of that size to the kernel every time, and the kernel unmaps and zeroes it page by page. That takes a third of the
step of a small convolutional net, and a quarter of the step of a small transformer. So programs that train on a CPU are
compiled to allocate pieces that fit into a heap of malloc (`pieces`), and malloc is told to keep freed memory (`keep`).

Each thread has a heap of its own, so threads do not wait for each other. Waiting would slow down a step of 0.1 ms.
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
"""Bytes of a thread's heap in malloc: the limit for all values in it together."""

LARGEST = int(0.9 * HEAP)
"""Bytes of the largest value, or of all temporaries as one piece, that fit into a thread's heap."""

PIECE = 2**24
"""Smallest size of a piece in bytes. XLA packs values into a piece as long as they fit."""

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""

SHARE = 0.25
"""Fraction of the memory that may be kept. Each thread that runs programs keeps the temporaries of one program."""


def pieces(jaxpr: Any) -> dict[str, int]:
    """The compiler option that makes a program on a CPU allocate its temporaries in pieces.

    The dict is empty if malloc would not keep the pieces. There are three such cases: malloc is not that of the GNU C
    library; the environment configures malloc (variables such as `MALLOC_ARENA_MAX`, or `GLIBC_TUNABLES`); or a value
    of the program, counted whole also on a mesh, is larger than `LARGEST`.

    >>> pieces(jax.make_jaxpr(lambda x: x + 1)(jax.ShapeDtypeStruct((2**24,), "float32")).jaxpr)
    {}
    """
    largest = max((_bytes(e) for e in equations(jaxpr)), default=0)
    if _mallopt() is None or largest > LARGEST:
        return {}
    piece = max(PIECE, min(2 * largest, LARGEST))  # XLA warns of values that are larger than a piece
    return {"xla_multiheap_size_constraint_per_heap": piece}


def keep(temporaries: int) -> bool:
    """Tell malloc to keep the memory of a program that has this many bytes of temporaries.

    For the rest of the process, malloc takes all pieces that fit from its heaps, and returns no heap to the kernel even
    if it is all free. Nothing is changed if all threads together would keep more than a quarter of the memory.

    Returns:
        True if malloc was told to.
    """
    mallopt = _mallopt()
    if mallopt is None or not fits(temporaries):
        return False
    most = mallopt(MMAP_THRESHOLD, HEAP) or mallopt(MMAP_THRESHOLD, HEAP // 2 - 1)  # before glibc 2.35
    return bool(most and mallopt(TOP_PAD, HEAP) and mallopt(TRIM_THRESHOLD, 2**31 - 1))


def fits(temporaries: int) -> bool:
    """True if every thread may keep this many bytes (see `SHARE`), and malloc can be told to.

    >>> fits(2**60)
    False
    """
    return _mallopt() is not None and _threads() * temporaries <= SHARE * _memory()


def _mallopt() -> Any:
    """The GNU C library's function `mallopt`; None if there is none or the environment configures malloc already."""
    if not sys.platform.startswith("linux"):
        return None
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none


def _bytes(equation: Any) -> int:
    """Bytes of the largest result of an equation, with at least 32 bits an element, as XLA computes on a CPU."""
    avals = [var.aval for var in equation.outvars]
    return max((a.size * max(4, a.dtype.itemsize) for a in avals if hasattr(a, "dtype")), default=0)


def _threads() -> int:
    """Number of threads in which XLA runs programs."""
    return max(len(os.sched_getaffinity(0)), jax.local_device_count())


def _memory() -> int:
    """Bytes of memory of this machine, or the limit of a control group (v2, v1) of this process if that is smaller."""
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
