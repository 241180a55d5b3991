"""A source of a `datasets.Dataset` of Hugging Face.

The library is not imported here; its objects are recognized by their attributes. `HuggingFaceRows` reads plain rows;
rows with a transform are read by `Indexed`, because the transform may return anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.check import stack
from sapwood.data.feature import RAW, TEXT, Feature, to_device_dtype
from sapwood.data.image.column import ImageColumn
from sapwood.data.sources.labels import Classes, encode, rename, weighing
from sapwood.data.sources.random_access import Indexed
from sapwood.data.sources.source import THREADS, Source

TEXTS = ("string", "large_string")
LISTS = ("Sequence", "List", "LargeList")
KNOWN = 64  # at most so many classes are probed for whether a transform changes the label


def is_hub(value: Any) -> bool:
    """Whether `value` is a `datasets.Dataset` or a dict of them by split, judged by its attributes."""
    if isinstance(value, Mapping):
        return bool(value) and all(is_hub(v) for v in value.values())
    return hasattr(value, "column_names") and hasattr(value, "features") and hasattr(value, "with_format")


def from_hub(
    rows: Any, split: str | None, target: str | None, classes: Classes, remember: bool | None = None
) -> Source:
    """A source of the rows of a `datasets.Dataset`, or of one split in a dict of them.

    It has the columns that `set_format` chose. A transform (`set_transform`, `with_transform`) is applied.

    Args:
        rows: the data set, or a dict of data sets by split.
        split: the split of a dict, default "train"; for one data set, its own split or None.
        target: the column that becomes "label"; default "label", if there is one.
        classes: the names of the label's classes or their number; None takes those of its `ClassLabel`, or finds them
            out from the values.
        remember: whether examples are cached; None caches them unless there is a transform, which may be random.

    Raises:
        DataError: there is no such split, or the data set is streamed.
    """
    others = [r for r in rows.values() if hasattr(r, "__len__")] if isinstance(rows, Mapping) else []
    rows = _split(rows, split)
    if not hasattr(rows, "__len__"):
        raise DataError("a streamed data set has no random access; load it without streaming=True")
    chosen = rows.format
    if chosen["type"] == "custom":
        return _transformed(rows, target, classes, bool(remember))
    chosen_rows = rows if chosen["output_all_columns"] else rows.select_columns(chosen["columns"])
    source = HuggingFaceRows(chosen_rows, target, classes, others)
    source.changes = remember is False
    return source


def _transformed(rows: Any, target: str | None, classes: Classes, remember: bool) -> Indexed:
    """A source of rows with a transform. It is applied each time a row is read, unless `remember`, as it may be random.

    If the transform leaves the label as it is stored, the classes have the names of the `ClassLabel`, or are the sorted
    texts of the column.
    """
    source = Indexed(rows, target, classes, remember)
    label, kind = source.features.get("label"), rows.features.get(target or "label")
    if classes is None and label is not None and label.shape == () and (label.dtype == TEXT or "int" in label.dtype):
        names = kind.names if type(kind).__name__ == "ClassLabel" else None
        if label.dtype == TEXT and getattr(kind, "dtype", None) in TEXTS:
            names = sorted(rows.with_format(None).unique(target or "label"))
        if names is not None and _as_stored(source, rows, target or "label"):
            source = Indexed(rows, target, names, remember)
    return source


def _as_stored(source: Indexed, rows: Any, name: str) -> bool:
    """Whether a transform leaves the label unchanged, judged by the first example of each of up to `KNOWN` classes."""
    stored = np.asarray(rows.with_format("numpy", columns=[name])[name][:])
    firsts = np.unique(stored, return_index=True)[1]
    looked_at = firsts[np.unique(np.linspace(0, len(firsts) - 1, KNOWN).astype(int))]
    return all(source.read(int(i))["label"] == stored[i] for i in looked_at)


class HuggingFaceRows(Source):
    """A source of the rows of a `datasets.Dataset`, as NumPy arrays.

    Images are decoded by `decode_image`, with 1 channel if the images of all splits are gray, else 3; `Image(mode=...)`
    overrides that. The label has the classes of its `ClassLabel`, else those that `labels.encode` finds out.

    Args:
        rows: the data set.
        target: the column that becomes "label", in place of a column called "label"; default "label", if there is one.
        classes: the names of the label's classes or their number; None as above.
        others: the data sets of all splits, for the channels of images.
    """

    def __init__(self, rows: Any, target: str | None, classes: Classes, others: Sequence[Any] = ()):
        self.target = target or ("label" if "label" in rows.column_names else None)
        images = [n for n, kind in rows.features.items() if n != self.target and _is_image(kind)]
        self.rows = rows.with_format("numpy", columns=[n for n in rows.column_names if n not in images])
        self.cells = rows.with_format(None).select_columns(images)
        for name in images:
            self.cells = self.cells.cast_column(name, type(rows.features[name])(decode=False))
        self.threads = THREADS if images else 1
        self.labels, self.others = None, others
        for name, kind in rows.features.items():
            _refuse_lists_of_images(name, kind)
        self.features = weighing({n: _feature(f) for n, f in rename(rows.features, self.target, classes).items()})
        self.pictures = {n: self._pictures(n, rows.features[n].mode) for n in images if n in self.features}
        self.features |= {n: pictures.feature for n, pictures in self.pictures.items()}
        if self.target is not None:
            self._label(rows.features[self.target], classes)

    def _pictures(self, name: str, mode: str | None) -> ImageColumn:
        """A column of images; `mode` is that of its `Image` feature."""
        cells = _Cells(self.cells, name)
        others = (_stored(r, name) for r in self.others if _is_image(r.features.get(name)))
        beside = (cell for other in others for cell in other)
        grey = None if mode is None else mode == "L"
        return ImageColumn(cells, lambda i: f"{name} of example {i}", grey=grey, beside=beside)

    def _label(self, kind: Any, classes: Classes) -> None:
        """Read and encode all labels; `kind` is the feature of their column."""
        values = np.asarray(self.rows[self.target][:]) if len(self.rows) else np.zeros(0, np.int32)
        if type(kind).__name__ == "ClassLabel" and classes is None:
            self.labels = values.astype(np.int32)  # a ClassLabel uses -1 for "unlabelled"; the check refuses it
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
                batch[name] = to_device_dtype(name, values)
            else:
                batch |= stack([{name: v} for v in values], indices, self.where)
        return batch | self._seen([int(i) for i in indices])

    def _seen(self, numbers: list[int]) -> dict[str, np.ndarray]:
        """The decoded images of these rows."""
        if not self.pictures:
            return {}
        cells = self.cells[numbers]
        read = {n: dict(zip(numbers, cells[n], strict=True)) for n in self.pictures}
        examples = self.in_parts(
            lambda part: [{n: p.seen(read[n][i], i) for n, p in self.pictures.items()} for i in part], numbers
        )
        return stack(examples, numbers, self.where)

    def read(self, index: int) -> dict[str, Any]:
        return {n: a[0] for n, a in self.gather(np.array([index])).items()}

    def column(self, name: str) -> np.ndarray:
        if name == "label" and self.labels is not None:
            return self.labels
        return super().column(name)


class _Cells:
    """One column of a data set as a sequence, without decoding."""

    def __init__(self, rows: Any, name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index][self.name]

    def __iter__(self) -> Iterator[Any]:
        return (row[self.name] for row in self.rows)


def _stored(rows: Any, name: str) -> _Cells:
    """A column of images, encoded as they are stored."""
    rows = rows.with_format(None).select_columns([name])
    return _Cells(rows.cast_column(name, type(rows.features[name])(decode=False)), name)


def _is_image(kind: Any) -> bool:
    """Whether a feature is an image that `decode_image` reads. Modes other than L and RGB are left to `datasets`."""
    return type(kind).__name__ == "Image" and getattr(kind, "decode", True) and kind.mode in (None, "L", "RGB")


def _refuse_lists_of_images(name: str, kind: Any) -> None:
    """Raise `DataError` if a column holds lists of images."""
    inner = kind
    while type(inner).__name__ in LISTS:
        inner = inner.feature
    if inner is not kind and type(inner).__name__ == "Image":
        raise DataError(
            f"{name} holds lists of images, and one array an example is expected. Leave it out, "
            f'rows.remove_columns("{name}"), or make an array of each list in rows.with_transform(...), as '
            "np.stack([sw.data.decode_image(image) for image in images])"
        )


def _split(rows: Any, split: str | None) -> Any:
    """The data set of a split; `DataError` if there is no such split."""
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
    """Convert a feature of `datasets`: Value, ClassLabel, Image, Sequence or List, ArrayND. Others become `RAW`."""
    name = type(kind).__name__
    if name == "Value":
        return Feature((), _dtype(kind.dtype))
    if name == "ClassLabel":
        return Feature((), "int32", classes=tuple(kind.names))
    if name == "Image":
        return Feature((None, None, None), "uint8", low=0, high=255)
    if name.startswith("Array") and hasattr(kind, "shape"):
        return Feature(tuple(kind.shape), _dtype(kind.dtype))
    if name in LISTS:
        inner = _feature(kind.feature)
        length = getattr(kind, "length", -1)
        return Feature((None if length in (-1, None) else length, *inner.shape), inner.dtype)
    return Feature((), RAW)


def _dtype(name: str) -> str:
    """The device's dtype for a dtype of `datasets`; `TEXT` for text, `RAW` for one that NumPy does not have."""
    if name in TEXTS:
        return TEXT
    try:
        dtype = np.dtype(name)
    except TypeError:
        return RAW
    return to_device_dtype("", np.zeros(0, dtype)).dtype.name
