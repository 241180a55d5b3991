"""A data set of the Hugging Face `datasets` library, recognised by how it looks; the library is not imported here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.features import RAW, TEXT, Feature, narrow, stack
from sapwood.data.source import Source
from sapwood.data.sources.labels import Classes, encode, rename


def is_hub(value: Any) -> bool:
    """Whether `value` is a `datasets.Dataset`, or a dict of them by split."""
    if isinstance(value, Mapping):
        return bool(value) and all(is_hub(v) for v in value.values())
    return hasattr(value, "column_names") and hasattr(value, "features") and hasattr(value, "with_format")


class Hub(Source):
    """Rows of a `datasets.Dataset`, as NumPy. The column `target` (default "label", if there) is "label", with the
    classes of its `ClassLabel`, else those that its values tell; another column of that name is left out."""

    threads = 1

    def __init__(self, rows: Any, split: str | None, target: str | None, classes: Classes):
        rows = _split(rows, split)
        if not hasattr(rows, "__len__"):
            raise DataError("a streamed data set has no random access; load it without streaming=True")
        self.rows = rows.with_format("numpy")
        self.target = target or ("label" if "label" in rows.column_names else None)
        self.labels = None
        self.features = {n: _feature(f) for n, f in rename(rows.features, self.target, classes).items()}
        if self.target is not None:
            self._label(rows.features[self.target], classes)

    def _label(self, kind: Any, classes: Classes) -> None:
        values = np.asarray(self.rows[self.target][:]) if len(self.rows) else np.zeros(0, np.int32)
        if type(kind).__name__ == "ClassLabel" and classes is None:
            self.labels = values.astype(np.int32)  # -1 stands for "unlabelled" there: the check says so
        else:
            self.labels, self.features["label"] = encode(values, classes)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = rename(self.rows[[int(i) for i in indices]], self.target)
        batch = {}
        for name, values in rows.items():
            if name == "label" and self.labels is not None:
                batch[name] = self.labels[indices]
            elif isinstance(values, np.ndarray) and values.dtype != object:
                batch[name] = narrow(name, values)
            else:
                batch |= stack([{name: v} for v in values], indices, self.where)
        return batch

    def read(self, index: int) -> dict[str, Any]:
        return {n: a[0] for n, a in self.gather(np.array([index])).items()}

    def column(self, name: str) -> np.ndarray:
        if name == "label" and self.labels is not None:
            return self.labels
        return super().column(name)


def _split(rows: Any, split: str | None) -> Any:
    if isinstance(rows, Mapping):
        wanted = split or "train"
        if wanted not in rows:
            raise DataError(f"the data set has no split {wanted!r}; it has {', '.join(map(repr, rows))}")
        return rows[wanted]
    own = str(rows.split) if getattr(rows, "split", None) is not None else None
    if split is not None and split != own:
        raise DataError(
            f"the data set is one split ({own}), not {split!r}; choose it when loading, or give the whole dict"
        )
    return rows


def _feature(kind: Any) -> Feature:
    """What a `datasets` feature says: Value, ClassLabel, Image, Sequence or List, ArrayND."""
    name = type(kind).__name__
    if name == "Value":
        return Feature((), _dtype(kind.dtype))
    if name == "ClassLabel":
        return Feature((), "int32", classes=tuple(kind.names))
    if name == "Image":
        return Feature((None, None, None), "uint8", low=0, high=255)
    if name.startswith("Array") and hasattr(kind, "shape"):
        return Feature(tuple(kind.shape), _dtype(kind.dtype))
    if name in ("Sequence", "List", "LargeList"):
        inner = _feature(kind.feature)
        length = getattr(kind, "length", -1)
        return Feature((None if length in (-1, None) else length, *inner.shape), inner.dtype)
    return Feature((), RAW)


def _dtype(name: str) -> str:
    if name in ("string", "large_string"):
        return TEXT
    try:
        dtype = np.dtype(name)
    except TypeError:
        return RAW
    return narrow("", np.zeros(0, dtype)).dtype.name
