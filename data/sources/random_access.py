"""`Indexed`: a source of any object with `__len__` and `__getitem__`.

Such objects are lists, PyTorch data sets, `grain.MapDataset` and custom classes. Nothing declares what their examples
are, so the features are inferred from a few of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.check import stack
from sapwood.data.feature import RAW, TEXT, Feature, array, to_device_dtype
from sapwood.data.image.decode import GREY, class_numbers, decode, is_picture
from sapwood.data.sources.labels import Classes, rename, weighing
from sapwood.data.sources.source import Source

PROBES = 8  # examples that are read to infer the features


class Indexed(Source):
    """A source of `rows[i]`: a dict of arrays, a tuple (inputs, label), or only the inputs ("features").

    Shapes and dtypes are inferred from `PROBES` examples spread over the data set: a dimension in which they differ is
    None, and the dtype is one that holds the values of all. Pillow images are decoded by `decode_image`, with 1 channel
    if the probed ones are all gray. `rows.__getitems__(list)` is used, if there is one, to read many examples at once.
    Examples are read in one thread, since the object may not be thread-safe.

    Args:
        rows: the object.
        target: the entry that becomes "label", in place of an entry called "label".
        classes: the names of the label's classes or their number. By default the names are the object's `classes`, an
            attribute of torchvision's data sets.
        remember: whether examples are cached. By default those of a list or of tensors are; others are read each time,
            since they may be random.

    Raises:
        DataError: the data set is empty, or its examples have different dimensions or types.
        ConfigError: `classes` without a label, or `remember` with examples that change when they are read again.
    """

    threads = 1

    def __init__(self, rows: Any, target: str | None, classes: Classes, remember: bool | None = None):
        self.rows, self.target, self.classes = rows, target, classes
        self._number = {n: i for i, n in enumerate(classes)} if classes and not isinstance(classes, int) else None
        if not len(rows):
            raise DataError("the data set is empty; at least one example is needed")
        numbers = [int(i) for i in np.unique(np.linspace(0, len(rows) - 1, PROBES).astype(int))]
        named = [self._named(rows[i], i) for i in numbers]
        pictures = [n for n, value in named[0].items() if is_picture(value)]
        self._grey = {n: all(getattr(row.get(n), "mode", "L") in GREY for row in named) for n in pictures}
        probes = [self._typed(row, i) for row, i in zip(named, numbers, strict=True)]
        self.changes = not (_lies_there(rows) if remember is None else remember)
        if remember:
            self._refuse_changing(probes, numbers)
        self.features = weighing({name: _probe(name, [p[name] for p in probes if name in p]) for name in probes[0]})
        label = self.features.get("label")
        if classes is None and label is not None and label.shape == () and "int" in label.dtype:
            classes = _classes_of(rows)
        if classes is not None:
            if "label" not in self.features:
                raise ConfigError(f"classes describe a label; name it with target=: {', '.join(map(repr, probes[0]))}")
            count = classes if isinstance(classes, int) else len(classes)
            names = None if isinstance(classes, int) else tuple(classes)
            label = self.features["label"]
            self.features["label"] = Feature(label.shape, label.dtype, classes=names, num_classes=count)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> dict[str, Any]:
        return self._typed(self._named(self.rows[index], index), index)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        many = getattr(self.rows, "__getitems__", None)
        if many is None:
            return super().gather(indices)
        numbers = [int(i) for i in indices]
        rows = [self._typed(self._named(row, i), i) for row, i in zip(many(numbers), numbers, strict=True)]
        return stack(rows, numbers, self.where)

    def _named(self, row: Any, index: int) -> dict[str, Any]:
        """An example as a dict of its entries, without any conversion of their values."""
        if isinstance(row, tuple):
            if len(row) > 2:
                raise DataError(
                    f"example {index} is a tuple of {len(row)}, and (inputs, label) is expected: nothing says what the "
                    'rest is. Hand out a dict that names it, {"features": ..., "label": ..., "number": ...}; how much '
                    'an example counts is called "weight"'
                )
            row = dict(zip(("features", "label"), row, strict=False))
        elif not isinstance(row, Mapping):
            row = {"features": row}
        return dict(row) if self.target is None else rename(row, self.target, where=f"example {index}")

    def _typed(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The entries of an example converted to arrays: images decoded, labels that are text encoded."""
        entries = {n: self._pixels(n, v, index) if is_picture(v) else _value(n, v) for n, v in row.items()}
        label = entries.get("label")
        if self._number is not None and isinstance(label, str):
            if label not in self._number:
                known = ", ".join(map(repr, self._number))
                raise DataError(f"label of example {index} is {label!r}; classes are {known}")
            entries["label"] = np.int32(self._number[label])
        return entries

    def _refuse_changing(self, probes: list[dict[str, Any]], numbers: list[int]) -> None:
        """Raise `ConfigError` if a probed example differs when it is read again."""
        for probe, i in zip(probes, numbers, strict=True):
            if _differ(probe, self.read(i)):
                raise ConfigError(
                    f"example {i} is another when it is read again, as with random augmentation, which remember=True "
                    "would freeze; leave it out"
                )

    def _pixels(self, name: str, picture: Any, index: int) -> np.ndarray:
        """Decode a Pillow image: class numbers for the label, else pixels with the channels of the probed images."""
        if name == "label":
            return class_numbers(picture, f"{name} of example {index}")
        grey = self._grey.get(name, False)
        if grey and picture.mode not in GREY:
            raise DataError(
                f"{name} of example {index} is in colour ({picture.mode}), where those looked at first are grey; give "
                'all of them one mode: picture.convert("RGB") or ("L")'
            )
        return decode(picture, grey=grey, name=f"{name} of example {index}")


def _lies_there(rows: Any) -> bool:
    """Whether the object returns examples that are in memory, without computing anything when they are read."""
    if _is_subset(rows):
        return _lies_there(rows.dataset)
    kind = type(rows)
    return kind is list or (kind.__name__ == "TensorDataset" and kind.__module__.startswith("torch."))


def _is_subset(rows: Any) -> bool:
    """Whether this is a `torch.utils.data.Subset`, which returns examples of another data set unchanged."""
    return type(rows).__name__ == "Subset" and hasattr(rows, "indices") and hasattr(rows, "dataset")


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two readings of an example have different values. Python objects are not compared."""
    pairs = [(np.asarray(one[name]), np.asarray(other[name])) for name in one.keys() & other.keys()]
    return any(a.shape != b.shape or (a.dtype != object and a.tobytes() != b.tobytes()) for a, b in pairs)


def _classes_of(rows: Any) -> list[str] | None:
    """The names in the attribute `classes` of a data set, or of the data set that it is a `Subset` of.

    None if there is no list of different names, or a `target_transform` may change the class numbers.
    """
    names = getattr(rows, "classes", None)
    if names is None:
        return _classes_of(rows.dataset) if _is_subset(rows) else None
    plain = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not plain or len(set(names)) < len(names) or getattr(rows, "target_transform", None) is not None:
        return None
    return list(names)


def _value(name: str, value: Any) -> Any:
    """The value as an array of a device's dtype; text, bytes and None unchanged."""
    return value if isinstance(value, str | bytes) or value is None else to_device_dtype(name, value)


def _probe(name: str, values: list) -> Feature:
    """The feature of an entry, inferred from its values in a few examples."""
    if isinstance(values[0], str | bytes):
        return Feature((), TEXT)
    arrays = [array(name, v) for v in values]
    dtype = _common(name, {a.dtype for a in arrays})
    if dtype.kind == "O":
        return Feature(arrays[0].shape, RAW)
    if len({a.ndim for a in arrays}) > 1:
        raise DataError(
            f"{name} has {arrays[0].ndim} dimensions in one example and another number in others; one is expected"
        )
    shape = tuple(s.pop() if len(s) == 1 else None for s in map(set, zip(*(a.shape for a in arrays), strict=True)))
    return Feature(shape, dtype.name)


def _common(name: str, dtypes: set[np.dtype]) -> np.dtype:
    """The device's dtype that holds the values of all these dtypes; `DataError` if there is none."""
    try:
        if np.dtype(object) in dtypes or not any(d.kind in "US" for d in dtypes):
            return to_device_dtype(name, np.zeros(0, np.result_type(*dtypes))).dtype
    except TypeError:  # NumPy knows no dtype for both
        pass
    types = sorted("text" if d.kind in "US" else d.name for d in dtypes)
    raise DataError(f"{name} is {' in one example and '.join(types)} in another; one type is expected")
