"""Where examples come from (`Source`), and the reader that checks each one once and remembers what fits in memory."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.features import RAW, TEXT, Feature, cast, check, narrow, stack
from sapwood.data.pictures import Pictures

REMEMBER = 1 << 30  # bytes of decoded examples that a reader keeps; a larger set is decoded anew each time
ALIGNMENT = 64  # bytes: what XLA asks of memory that it is to use in place
THREADS = 8  # reading files, decompressing and decoding images release Python's lock
SHORT = 1.5e-4  # seconds; where an example takes less, threads lose more by taking turns at that lock than they gain
LOOK = 16  # batches from one look at how long an example takes to the next
CHUNK = 1024  # examples of one reading, where one entry of all examples is wanted


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
        types = _dtypes(features)
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


class Reader:
    """A source with two memories, shared by every slice of a data set: which examples were checked, and, where they
    have fixed shapes and fit into `REMEMBER` bytes together, the decoded examples themselves.

    So each example is checked and decoded once, and later batches are one indexing operation an entry.
    Reading from several threads is safe: at worst two of them decode the same example.
    """

    def __init__(self, source: Source, features: dict[str, Feature]):
        self.source, self.features = source, features
        try:
            self._checked = np.zeros(len(source), bool)
        except (MemoryError, OverflowError, ValueError) as error:
            raise DataError("the data says that it has more examples than there is memory for a bit of each") from error
        self._all_checked = False
        self._arrays = _room(len(source), features) if source.remember and not source.changes else None
        # what lies in memory has one dtype; examples that are read may each come in another
        self._dtypes = _dtypes(features) if source.remember else {}

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of `indices`, checked, as arrays `(examples, ...)`."""
        if self._all_checked and self._arrays is not None:
            return {name: take(a, indices) for name, a in self._arrays.items()}
        fresh = indices if self._all_checked else indices[~self._checked[indices]]
        if self._arrays is None:
            batch = self.source.gather(indices)
            if not self._all_checked and len(fresh):
                check(self.features, batch, indices, self.source.where)
            batch = self._as_declared(batch, indices)
        else:
            self._learn(np.unique(fresh))
            batch = {name: take(a, indices) for name, a in self._arrays.items()}
        if not self._all_checked and len(fresh) and not self.source.changes:
            self._checked[fresh] = True
            self._all_checked = bool(self._checked.all())
        return batch

    def _learn(self, fresh: np.ndarray) -> None:
        if not len(fresh) or self._arrays is None:
            return
        batch = self.source.gather(fresh)
        check(self.features, batch, fresh, self.source.where)
        if batch.keys() != self._arrays.keys():
            raise DataError(
                f"{self.source.where(int(fresh[0]))} has {', '.join(map(repr, batch))}; "
                f"{', '.join(map(repr, self._arrays))} were declared"
            )
        for name, values in self._as_declared(batch, fresh).items():
            self._arrays[name][fresh] = values

    def _as_declared(self, batch: dict[str, np.ndarray], entries: np.ndarray) -> dict[str, np.ndarray]:
        other = [n for n, dtype in self._dtypes.items() if n in batch and batch[n].dtype != dtype]
        where = self.source.where
        return batch | {n: cast(n, self.features[n], batch[n], entries, where) for n in other}

    def column(self, name: str) -> np.ndarray:
        """Entry `name` of all examples, unchecked."""
        return self._as_declared({name: self.source.column(name)}, np.arange(len(self)))[name]


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


def _room(count: int, features: dict[str, Feature]) -> dict[str, np.ndarray] | None:
    """Empty arrays for all examples, or None where shapes vary, are not known, or take too much memory."""
    if not features or any(None in f.shape or f.dtype == RAW for f in features.values()):
        return None
    shapes = {n: tuple(d or 0 for d in f.shape) for n, f in features.items()}
    dtypes = {n: np.dtype(object if f.dtype == TEXT else f.dtype) for n, f in features.items()}
    size = sum(count * math.prod(shapes[n]) * dtypes[n].itemsize for n in features)
    if size > REMEMBER:
        return None
    return {n: np.empty((count, *shapes[n]), dtypes[n]) for n in features}


def _dtypes(features: dict[str, Feature]) -> dict[str, np.dtype]:
    return {n: np.dtype(f.dtype) for n, f in features.items() if f.dtype not in (TEXT, RAW)}


def positive(indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`indices` as int64, negative ones counted from the end; IndexError outside `count` examples."""
    numbers = np.asarray(indices)
    if numbers.dtype == bool:
        if numbers.shape != (count,):
            raise IndexError(f"a mask of shape {numbers.shape} chooses among {count} examples; ({count},) is expected")
        return np.flatnonzero(numbers)
    numbers = numbers.astype(np.int64)
    wrong = (numbers < -count) | (numbers >= count)
    if wrong.any():
        raise IndexError(f"there is no example {numbers[wrong][0]}; the data set has examples 0..{count - 1}")
    return np.where(numbers < 0, numbers + count, numbers)
