"""Where examples come from (`Source`), and the reader that checks each one once and remembers what fits in memory."""

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
from sapwood.data.feature import RAW, TEXT, Feature, narrow
from sapwood.data.image.column import Pictures

ALIGNMENT = 64  # bytes: what XLA asks of memory that it is to use in place
THREADS = 8  # reading files, decompressing and decoding images release Python's lock


class Source:
    """Random access to examples: subclasses give `__len__`, `features` and `read` (or `gather`, if faster).

    A source says what is stored. Checking, remembering, slicing, mapping and shuffling are done around it.
    """

    features: dict[str, Feature]
    threads = THREADS  # 1 where reading holds Python's lock or is not thread-safe
    remember = True  # False where an example costs no more to read than to remember
    apart = 1  # examples fewer places apart overlap, so that a split at random would leak
    changes = False  # True where an example may be another each time it is read, as one that is augmented
    _asked, _short = 0, False  # how often `in_parts` was called, and what it saw when it looked

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> dict[str, Any]:
        """Example `index`, decoded."""
        raise NotImplementedError

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of `indices` as arrays `(examples, ...)`."""
        numbers = [int(i) for i in indices]
        return stack(self.in_parts(lambda part: [self.read(i) for i in part], numbers), numbers, self.where)

    def in_parts(self, read: Callable[[list[int]], list[Any]], numbers: list[int]) -> list[Any]:
        """`read(numbers)`, by several threads where that is allowed and examples take long; now and then it looks.

        A source that reads from another runs in those threads already: were they to wait for each other, all would.
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
        """Entry `name` of all examples; override where it can be had without decoding the rest."""
        chunks = np.array_split(np.arange(len(self)), max(1, len(self) // CHUNK))
        return np.concatenate([self.gather(c)[name] for c in chunks])

    def where(self, index: int) -> str:
        """How an error names example `index`."""
        return f"example {index}"


_thread = threading.local()  # `reads` is True in the threads of the pool


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "sapwood-read", lambda: setattr(_thread, "reads", True))


class ArraySource(Source):
    """Examples that lie in memory or in a file as arrays `(examples, ...)`, one an entry, or as `Pictures`.

    What lies in a file stays there: its rows get the dtype of their feature when they are read.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray | Pictures], features: dict[str, Feature]):
        self.arrays, self.features = arrays, features
        self.remember = any(isinstance(a, Pictures) for a in arrays.values())
        types = dtypes(features)
        self._turned = {n: types[n] for n, a in arrays.items() if n in types and getattr(a, "dtype", None) != types[n]}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: self._rows(name, values, indices) for name, values in self.arrays.items()}

    def column(self, name: str) -> np.ndarray:
        values = self.arrays[name]
        if isinstance(values, Pictures) or name in self._turned:
            return self._rows(name, values, np.arange(len(values)))
        return values

    def _rows(self, name: str, values: np.ndarray | Pictures, indices: np.ndarray) -> np.ndarray:
        """Rows in the dtype of their feature; an integer that does not fit is an error (`narrow`)."""
        if isinstance(values, Pictures):
            numbers = [int(i) for i in indices]
            examples = self.in_parts(lambda part: [{name: values[i]} for i in part], numbers)
            return stack(examples, numbers, self.where)[name]
        rows = take(values, indices)
        return narrow(name, rows).astype(self._turned[name], copy=False) if name in self._turned else rows


SHORT = 1.5e-4  # seconds; where an example takes less, threads lose more by taking turns at that lock than they gain


LOOK = 16  # batches from one look at how long an example takes to the next


CHUNK = 1024  # examples of one reading, where one entry of all examples is wanted


def take(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """``array[indices]`` in memory that begins at a multiple of 64 bytes: JAX on a CPU uses such memory as it is, where
    it would copy any other (the copy took three times as long as this)."""
    if array.dtype.kind not in "biufcV":  # text and Python objects go to no device
        return array[indices]
    shape = (len(indices), *array.shape[1:])
    size = math.prod(shape) * array.dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    rows = memory[start : start + size].view(array.dtype).reshape(shape)
    return np.take(array, indices, axis=0, out=rows, mode="clip")  # the indices are inside; "raise" would buffer


def dtypes(features: dict[str, Feature]) -> dict[str, np.dtype]:
    return {n: np.dtype(f.dtype) for n, f in features.items() if f.dtype not in (TEXT, RAW)}
