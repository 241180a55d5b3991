"""The reader of a source: it checks each example once and remembers those that fit in memory."""

import math
from collections.abc import Sequence

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.check import check
from sapwood.data.feature import RAW, TEXT, Feature, cast
from sapwood.data.sources.source import Source, dtypes, take

REMEMBER = 1 << 30  # bytes of decoded examples that a reader keeps; a larger set is decoded anew each time


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
        self._dtypes = dtypes(features) if source.remember else {}

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
