"""Labels and weights: the choice of the label entry, and the encoding of labels as class numbers with names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.feature import Feature, on_disk, rows, to_device_dtype
from sapwood.data.image.decode import class_numbers, is_picture

Classes = int | Sequence[str] | None

WEIGHT = Feature((), "float32", low=0)


def rename(
    entries: Mapping[str, Any], target: str | None, classes: Classes = None, where: str = "the data"
) -> dict[str, Any]:
    """Rename the entry `target` to "label", and drop another entry called "label".

    Args:
        entries: the entries by name.
        target: the entry to rename; None changes nothing.
        classes: the `classes` option of the source, which needs a label.
        where: what the message calls the data.

    Raises:
        ConfigError: there is no such entry, or `classes` are given and there is no label.

    Example:
        >>> rename({"x": 1, "kind": 2, "label": 3}, "kind")
        {'x': 1, 'label': 2}
    """
    if target is None:
        if classes is not None and "label" not in entries:
            raise ConfigError(f"classes describe a label; name it with target=: {', '.join(map(repr, entries))}")
        return dict(entries)
    if target not in entries:
        there = ", ".join(map(repr, entries))
        raise ConfigError(f"{where} has no entry {target!r} to be the target; it has {there}")
    return {("label" if n == target else n): value for n, value in entries.items() if n == target or n != "label"}


def encode(
    values: Any, classes: Classes, name: str = "label", where: Callable[[int], str] = "example {}".format
) -> tuple[np.ndarray, Feature]:
    """Encode labels, and return them with their feature.

    Text becomes the number of its class, int32. Integers are class numbers already, and become int32. Floats are
    targets of a regression and are not encoded. Integers that are all -1 or 1 are the signs of the hinge loss, not
    class numbers.

    Args:
        values: labels `(examples, ...)`, or a list of Pillow images such as segmentation masks.
        classes: the names of the classes in order, or their number. By default they are the categories of a pandas
            categorical, the sorted texts, the integers from 0 to the largest label, or 0 and 1 for bool.
        name: the entry, for messages.
        where: a function from an index to the name of the example, for messages.

    Raises:
        DataError: a label is negative, unknown, or an empty text that `classes` does not list.
        ConfigError: `classes` does not go with the dtype of the labels.

    Example:
        >>> encode(["dog", "cat", "dog"], None)[0].tolist(), encode(["dog", "cat"], None)[1].classes
        ([1, 0, 1], ('cat', 'dog'))
    """
    if isinstance(values, list | tuple) and any(map(is_picture, values[:1])):
        values = [class_numbers(value, f"{name} of example {i}") for i, value in enumerate(values)]
    if classes is None:  # pandas categories are ordered, and one may have no example
        classes = categories(values)
    values = rows(name, values)
    if values.dtype == bool and classes is None:
        classes = 2
    if values.dtype.kind in "UOST" and values.size:
        return _encode_text(to_device_dtype(name, values), classes, name, where)
    kept = on_disk(values)  # the source converts them to int32 when it reads them
    values = values if kept else to_device_dtype(name, values, where)
    if values.dtype.kind not in "biu":
        if classes is not None:
            raise ConfigError(f"classes were given, but {name} holds {values.dtype.name}; classes are integers or text")
        return values, Feature(values.shape[1:], to_device_dtype(name, values[:1]).dtype.name)
    values = values if kept else values.astype(np.int32, copy=False)
    if classes is None:
        if values.size and (values.min(), values.max()) == (-1, 1) and np.all(values != 0):
            return values, Feature(values.shape[1:], "int32", low=-1, high=1)
        if values.size and values.min() < 0:
            first = tuple(np.argwhere(values < 0)[0])
            raise DataError(
                f"{name} of {where(int(first[0]))} is {values[first]}; classes are counted from 0. Renumber them, or "
                "give floats for a regression (-1 and 1 alone are the signs of the loss hinge)"
            )
        classes = int(values.max()) + 1 if values.size else 0
    return values, _feature(values, classes)


def categories(values: Any) -> list[str] | None:
    """The categories of a pandas categorical of text, in order; None for anything else."""
    words = getattr(getattr(values, "cat", values), "categories", None)
    return list(words) if words is not None and all(isinstance(word, str) for word in words) else None


def weights(values: Any) -> tuple[np.ndarray, Feature]:
    """The weights of examples as float32, and their feature. `DataError` if one is not a number."""
    try:
        return np.asarray(values).astype(np.float32), WEIGHT
    except (TypeError, ValueError) as error:
        example = next((f" of example {i}" for i, x in enumerate(values) if not _is_number(x)), "")
        raise DataError(f"weight{example} is no number: {error}") from error


def _is_number(value: Any) -> bool:
    """Whether NumPy converts the value to float32."""
    try:
        np.float32(value)
    except (TypeError, ValueError):
        return False
    return True


def weighing(features: dict[str, Feature]) -> dict[str, Feature]:
    """Replace the feature of a numeric entry "weight" by that of an example's weight: float32, 0 or more."""
    weight = features.get("weight")
    if weight is None or weight.shape != () or np.dtype(weight.dtype).kind not in "biuf":
        return features
    return features | {"weight": WEIGHT}


def _feature(values: np.ndarray, classes: int | Sequence[str]) -> Feature:
    """The feature of encoded labels with these classes."""
    shape, dtype = values.shape[1:], "int32"
    if isinstance(classes, int):
        return Feature(shape, dtype, num_classes=classes)
    return Feature(shape, dtype, classes=tuple(classes))


def _encode_text(
    values: np.ndarray, classes: Classes, name: str, where: Callable[[int], str]
) -> tuple[np.ndarray, Feature]:
    """Encode labels that are text; the arguments are those of `encode`."""
    if isinstance(classes, int):
        raise ConfigError(f"{name} holds text; give the names of the classes, not their number {classes}")
    texts = values.reshape(-1).tolist()
    each = len(texts) // len(values) if values.ndim else 1  # labels per example
    for i, value in enumerate(texts):
        if not isinstance(value, str):
            raise DataError(
                f"{name} of {where(i // each)} is {value!r}, of type {type(value).__name__}; labels are expected to "
                "be all text, or an array of numbers"
            )
        if classes is None and not value.strip():
            raise DataError(
                f"{name} of {where(i // each)} is empty; leave that example out, or name the classes with classes="
            )
    names = sorted(set(texts)) if classes is None else list(classes)
    number = {n: i for i, n in enumerate(names)}
    for i, value in enumerate(texts):
        if value not in number:
            raise DataError(f"{name} of {where(i // each)} is {value!r}; classes are {', '.join(map(repr, names))}")
    numbers = np.array([number[v] for v in texts], np.int32).reshape(values.shape)
    return numbers, _feature(numbers, names)
