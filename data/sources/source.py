"""`Source`: the base class of all sources of examples, and `ArraySource` for arrays in memory or in a file.

A source only reads what is stored. `Reader` (data/reader.py) checks and caches examples; `Dataset` slices, maps and
weights them.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from sapwood.data.check import stack
from sapwood.data.feature import RAW, TEXT, Feature, to_device_dtype
from sapwood.data.image.column import ImageColumn

ALIGNMENT = 64  # bytes: XLA uses memory with this alignment without a copy
THREADS = 8  # reading files, decompressing and decoding images release the GIL


class Source:
    """Base class for random access to examples.

    A subclass defines `__len__`, `features` and `read`, or `gather` if reading many at once is faster. A source only
    reads what is stored; checks, caches, slices, maps and shuffling are outside it.

    Attributes:
        features: the feature of each entry of an example.
        threads: threads that read; 1 if reading holds the GIL or is not thread-safe.
        remember: whether a reader may cache examples; False if reading one costs no more than the cache.
        apart: examples whose indices differ by less than this overlap, so a random split would leak.
        changes: whether an example may differ each time it is read, as with random augmentation.
    """

    features: dict[str, Feature]
    threads = THREADS
    remember = True
    apart = 1
    changes = False
    _asked, _short = 0, False  # calls of `in_parts` with many examples; whether reading was fast when it was last timed

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> dict[str, Any]:
        """Example `index` as a dict of decoded entries."""
        raise NotImplementedError

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of `indices` as arrays `(examples, ...)`."""
        numbers = [int(i) for i in indices]
        return stack(self.in_parts(lambda part: [self.read(i) for i in part], numbers), numbers, self.where)

    def in_parts(self, read: Callable[[list[int]], list[Any]], numbers: list[int]) -> list[Any]:
        """`read(numbers)`, split over several threads if `threads` allows it and examples are slow to read.

        Every `LOOK` calls it times the first two examples; below `SHORT` seconds each, threads are not used. Within a
        thread of the pool, as for a source that reads from another source, it does not use threads, since threads that
        wait for the pool they run in would deadlock.

        Args:
            read: a function from a list of indices to the list of their examples.
            numbers: the indices.
        """
        if self.threads < 2 or len(numbers) < 2 * self.threads or getattr(_thread, "reads", False):
            return read(numbers)
        found, self._asked = [], self._asked + 1
        if self._asked % LOOK == 1:
            begun = time.perf_counter()
            found, numbers = read(numbers[:2]), numbers[2:]
            self._short = time.perf_counter() - begun < 2 * SHORT
        if self._short:
            return found + read(numbers)
        cuts = np.linspace(0, len(numbers), self.threads + 1).astype(int)
        parts = _pool().map(read, [numbers[a:b] for a, b in itertools.pairwise(cuts)])
        return found + [example for part in parts for example in part]

    def column(self, name: str) -> np.ndarray:
        """Entry `name` of all examples. Override it if that is possible without decoding the other entries."""
        chunks = np.array_split(np.arange(len(self)), max(1, len(self) // CHUNK))
        return np.concatenate([self.gather(c)[name] for c in chunks])

    def where(self, index: int) -> str:
        """The name of example `index` in error messages."""
        return f"example {index}"


_thread = threading.local()  # `reads` is True in the threads of the pool


@cache
def _pool() -> ThreadPoolExecutor:
    """The pool of threads that all sources share."""
    return ThreadPoolExecutor(THREADS, "sapwood-read", lambda: setattr(_thread, "reads", True))


class ArraySource(Source):
    """Examples whose entries are arrays `(examples, ...)` in memory or in a file (`np.memmap`), or `Pictures`.

    An array in a file is not loaded; its rows are converted to the dtype of their feature when they are read.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray | ImageColumn], features: dict[str, Feature]):
        self.arrays, self.features = arrays, features
        self.remember = any(isinstance(a, ImageColumn) for a in arrays.values())
        types = dtypes(features)
        self._turned = {n: types[n] for n, a in arrays.items() if n in types and getattr(a, "dtype", None) != types[n]}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self._rows(name, values, indices) for name, values in self.arrays.items()}

    def column(self, name: str) -> np.ndarray:
        values = self.arrays[name]
        if isinstance(values, ImageColumn) or name in self._turned:
            return self._rows(name, values, np.arange(len(values)))
        return values

    def _rows(self, name: str, values: np.ndarray | ImageColumn, indices: np.ndarray) -> np.ndarray:
        """Rows of an entry in the dtype of its feature. `DataError` for an integer that does not fit (`narrow`)."""
        if isinstance(values, ImageColumn):
            numbers = [int(i) for i in indices]
            examples = self.in_parts(lambda part: [{name: values[i]} for i in part], numbers)
            return stack(examples, numbers, self.where)[name]
        rows = take(values, indices)
        return to_device_dtype(name, rows).astype(self._turned[name], copy=False) if name in self._turned else rows


SHORT = 1.5e-4  # seconds; for examples that are read faster, threads lose more by waiting for the GIL than they gain


LOOK = 16  # batches between two timings of how long an example takes


CHUNK = 1024  # examples that are read at once when one entry of all examples is needed


def take(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """``array[indices]`` in memory that starts at a multiple of `ALIGNMENT` bytes.

    JAX on a CPU uses such memory in place and copies any other (the copy took three times as long as this).
    """
    if array.dtype.kind not in "biufcV":  # no device takes text and Python objects
        return array[indices]
    shape = (len(indices), *array.shape[1:])
    size = math.prod(shape) * array.dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    rows = memory[start : start + size].view(array.dtype).reshape(shape)
    return np.take(array, indices, axis=0, out=rows, mode="clip")  # indices are in range; "raise" would buffer


def dtypes(features: dict[str, Feature]) -> dict[str, np.dtype]:
    """The dtype of each feature that is neither text nor other Python objects."""
    return {n: np.dtype(f.dtype) for n, f in features.items() if f.dtype not in (TEXT, RAW)}
