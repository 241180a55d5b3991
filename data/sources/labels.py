"""Labels as stored, to class numbers with their names."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.features import Feature, narrow

Classes = int | Sequence[str] | None


def encode(values: Any, classes: Classes, name: str = "label") -> tuple[np.ndarray, Feature]:
    """Labels and their feature. Text becomes the number of its class, int32; integers are class numbers already;
    floats are targets of a regression and stay.

    Args:
        values: labels `(examples, ...)`.
        classes: the names of the classes in order, or their number; default what the values tell: the sorted
            texts, or the integers 0 to the largest.

    Example:
        >>> encode(["dog", "cat", "dog"], None)[0].tolist(), encode(["dog", "cat"], None)[1].classes
        ([1, 0, 1], ('cat', 'dog'))
    """
    values = np.asarray(values)
    if values.dtype == bool:
        values = values.astype(np.int32)
    if values.dtype.kind in "UO" and values.size:
        return _encode_text(values, classes, name)
    values = narrow(name, values)
    feature = Feature(values.shape[1:], values.dtype.name)
    if values.dtype.kind not in "iu":
        if classes is not None:
            raise ConfigError(f"classes were given, but {name} holds {values.dtype.name}; classes are integers or text")
        return values, feature
    values = values.astype(np.int32, copy=False)
    if classes is None:
        if values.size and values.min() < 0:
            raise DataError(
                f"{name} of example {int(np.argwhere(values < 0)[0][0])} is {values.min()}; classes are counted from "
                "0. Renumber them, or give floats for a regression"
            )
        classes = int(values.max()) + 1 if values.size else 0
    return values, _feature(values, classes)


def _feature(values: np.ndarray, classes: int | Sequence[str]) -> Feature:
    shape, dtype = values.shape[1:], "int32"
    if isinstance(classes, int):
        return Feature(shape, dtype, num_classes=classes)
    return Feature(shape, dtype, classes=tuple(classes))


def _encode_text(values: np.ndarray, classes: Classes, name: str) -> tuple[np.ndarray, Feature]:
    if isinstance(classes, int):
        raise ConfigError(f"{name} holds text; give the names of the classes, not their number {classes}")
    texts = values.reshape(-1).tolist()
    for i, value in enumerate(texts):
        if not isinstance(value, str):
            raise DataError(
                f"{name} of example {i} is {value!r}, but others are text; every label is expected to be text"
            )
    names = sorted(set(texts)) if classes is None else list(classes)
    number = {n: i for i, n in enumerate(names)}
    for i, value in enumerate(texts):
        if value not in number:
            raise DataError(f"{name} of example {i} is {value!r}; classes are {', '.join(map(repr, names))}")
    numbers = np.array([number[v] for v in texts], np.int32).reshape(values.shape)
    return numbers, _feature(numbers, names)
