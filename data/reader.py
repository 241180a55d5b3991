"""`Reader`: reads the examples of a source, checks each once, and caches them if they fit into memory."""

import math
from collections.abc import Sequence

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.check import check
from sapwood.data.feature import RAW, TEXT, Feature, cast
from sapwood.data.sources.source import Source, dtypes, take

REMEMBER = 1 << 30  # bytes of decoded examples that a reader caches; a larger data set is decoded each time it is read


class Reader:
    """A source with two caches that all slices of a data set share.

    One records which examples were checked. The other holds the decoded examples, if they have fixed shapes and all of
    them fit into `REMEMBER` bytes. Then each example is checked and decoded once, and a later batch takes one indexing
    operation per entry. Reading from several threads is safe: at worst two of them decode the same example.

    If the source's examples change each time they are read (`Source.changes`), both caches are off.

    Args:
        source: where the examples come from.
        features: the feature of each entry that is checked.

    Raises:
        DataError: the source claims more examples than there is memory to record.
    """

    def __init__(self, source: Source, features: dict[str, Feature]):
        self.source, self.features = source, features
        try:
            self._checked = np.zeros(len(source), bool)
        except (MemoryError, OverflowError, ValueError) as error:
            raise DataError("the data says that it has more examples than there is memory for a bit of each") from error
        self._all_checked = False
        self._arrays = _room(len(source), features) if source.remember and not source.changes else None
        # arrays in memory have the feature's dtype already; examples that are read may come in others
        self._dtypes = dtypes(features) if source.remember else {}

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of `indices` as arrays `(examples, ...)`; `DataError` if one does not fit its features."""
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
        """Read and check the examples of `fresh`, and store them in the cache."""
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
        """Convert the entries of a batch to the dtypes of their features."""
        other = [n for n, dtype in self._dtypes.items() if n in batch and batch[n].dtype != dtype]
        where = self.source.where
        return batch | {n: cast(n, self.features[n], batch[n], entries, where) for n in other}

    def column(self, name: str) -> np.ndarray:
        """Entry `name` of all examples, without checks."""
        return self._as_declared({name: self.source.column(name)}, np.arange(len(self)))[name]


def _room(count: int, features: dict[str, Feature]) -> dict[str, np.ndarray] | None:
    """Uninitialized arrays for all examples. None if shapes vary or are unknown, or if they exceed `REMEMBER` bytes."""
    if not features or any(None in f.shape or f.dtype == RAW for f in features.values()):
        return None
    shapes = {n: tuple(d or 0 for d in f.shape) for n, f in features.items()}
    dtypes = {n: np.dtype(object if f.dtype == TEXT else f.dtype) for n, f in features.items()}
    size = sum(count * math.prod(shapes[n]) * dtypes[n].itemsize for n in features)
    if size > REMEMBER:
        return None
    return {n: np.empty((count, *shapes[n]), dtypes[n]) for n in features}


def positive(indices: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Convert `indices` to non-negative int64. Negative ones count from the end, a bool mask `(count,)` selects.

    Raises `IndexError` for an index that is out of range or a mask of another shape.
    """
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
