"""Checks of stacked examples against their features, and the stacking of single examples.

A "ragged" entry is an object array of arrays of different shapes. `stack` makes one if examples differ in shape, and
`even` turns it into a plain array once a `map` has made the shapes equal.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.feature import RAW, TEXT, Feature, array, is_ragged, raise_first_wrong, to_device_dtype


def check(
    features: Mapping[str, Feature],
    batch: Mapping[str, np.ndarray],
    entries: Sequence[int] | np.ndarray,
    where: Callable[[int], str] = "example {}".format,
) -> None:
    """Check stacked examples against their features: shape, range, classes, finite numbers.

    Args:
        features: the feature that each array of the batch must fit, by name. Other arrays are not checked.
        batch: arrays `(examples, ...)` by name, plain or ragged.
        entries: the index of each example, int `(examples,)`, for the message.
        where: a function from such an index to the name of the example, for the message.

    Raises:
        DataError: an example does not fit its feature (the message names the first one and what was expected), or the
            batch has no array for a feature.

    Example:
        >>> check({"label": Feature((), "int32", num_classes=10)}, {"label": np.array([3, 12])}, [16, 17])
        Traceback (most recent call last):
        sapwood.core.errors.DataError: label of example 17 is 12; classes are 0..9
    """
    for name, feature in features.items():
        if name not in batch:
            raise DataError(f"{name} is declared, but the examples have only {', '.join(map(repr, batch))}")
        values = batch[name]
        if is_ragged(values):
            for value, entry in zip(values, entries, strict=True):
                check({name: feature}, {name: value[None]}, [entry], where)
            continue
        _check_shape(name, feature, values, entries, where)
        _check_values(name, feature, values, entries, where)


def _check_shape(name, feature: Feature, values, entries, where) -> None:
    """Raise `DataError` if examples do not have the shape of the feature. A None in that shape fits any size.

    Text and other Python objects (`RAW`) may have any shape.
    """
    shape = values.shape[1:]
    fits = len(shape) == len(feature.shape) and all(b in (a, None) for a, b in zip(shape, feature.shape, strict=True))
    if not fits and feature.dtype not in (TEXT, RAW):
        raise DataError(f"{name} of {where(int(entries[0]))} has shape {shape}; {feature.shape} was expected")


def _check_values(name, feature: Feature, values, entries, where) -> None:
    """Raise `DataError` for numbers that are not finite, or outside the feature's bounds."""
    floating = "float" in values.dtype.name  # includes bfloat16 and float8, whose NumPy kind is V
    if not (floating or values.dtype.kind in "iu") or not values.size:
        return
    if floating and feature.finite:
        raise_first_wrong(name, feature, values, ~np.isfinite(values), "finite numbers are expected", entries, where)
    low, high = feature.bounds
    # min and max need no temporary array. The mask of wrong values is made only if there are any.
    if (low is not None and values.min() < low) or (high is not None and values.max() > high):
        wrong = np.zeros(values.shape, bool)
        wrong |= False if low is None else values < low
        wrong |= False if high is None else values > high
        raise_first_wrong(name, feature, values, wrong, _expected(feature), entries, where)


def _expected(feature: Feature) -> str:
    """The bounds of a feature in words, for a message."""
    low, high = feature.bounds
    if feature.vocabulary is not None:
        return f"the vocabulary has ids {low}..{high}"
    if feature.num_classes is not None:
        return f"classes are {low}..{high}"
    return f"the range is {'' if low is None else low}..{'' if high is None else high}"


def stack(examples: Sequence[Mapping[str, Any]], entries, where: Callable[[int], str]) -> dict[str, np.ndarray]:
    """Stack single examples into one dict of arrays `(examples, ...)`.

    An entry whose shapes differ becomes a ragged array (an object array of the examples' arrays), since a `map` may
    still make the shapes equal. Raises `DataError` if the examples do not have the same entries.
    """
    names = list(examples[0])
    for example, entry in zip(examples, entries, strict=True):
        if example.keys() != examples[0].keys():
            raise DataError(
                f"{where(int(entry))} has {', '.join(map(repr, example))}, but {where(int(entries[0]))} has "
                f"{', '.join(map(repr, names))}; every example needs the same entries"
            )
    return {name: _stack_entry(name, [e[name] for e in examples], entries, where) for name in names}


def _stack_entry(name: str, values: list, entries, where) -> np.ndarray:
    """Stack one entry: text and None into an object array, arrays of equal shape into one, others into a ragged one."""
    if isinstance(values[0], str | bytes) or values[0] is None:
        stacked = np.empty(len(values), object)
        stacked[:] = values
        return stacked
    arrays = [array(name, v) for v in values]
    if all(a.shape == arrays[0].shape for a in arrays):
        return to_device_dtype(name, np.stack(arrays))
    ragged = np.empty(len(arrays), object)
    ragged[:] = [to_device_dtype(name, a) for a in arrays]
    return ragged


def even(batch: Mapping[str, np.ndarray], entries, where: Callable[[int], str]) -> dict[str, np.ndarray]:
    """Turn ragged entries of a batch into plain arrays `(examples, ...)`.

    Raises `DataError`, naming two examples, if their shapes still differ.
    """
    evened = dict(batch)
    for name, values in batch.items():
        if not is_ragged(values):
            continue
        for value, entry in zip(values, entries, strict=True):
            if value.shape != values[0].shape:
                raise DataError(
                    f"{name} of {where(int(entry))} has shape {value.shape}, but {where(int(entries[0]))} has "
                    f"{values[0].shape}; a batch needs one shape: resize, pad or crop it with `map`"
                )
        evened[name] = np.stack(list(values))
    return evened
