"""Arrays as a source: a dict of arrays, a tuple (inputs, labels) or (inputs, labels, weights), or an .npz file.

An array may also be a list of Pillow images or a data frame. An `np.memmap` is not loaded.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.feature import Feature, array, infer, on_disk, rows, to_device_dtype
from sapwood.data.file_checks import check_unpacked
from sapwood.data.image.column import ImageColumn
from sapwood.data.image.decode import is_picture
from sapwood.data.sources.labels import Classes, encode, rename, weights
from sapwood.data.sources.source import ArraySource
from sapwood.data.sources.table import inputs_of, is_frame


def from_arrays(arrays: Mapping[str, Any], target: str | None, classes: Classes) -> ArraySource:
    """A source of a dict of arrays `(examples, ...)`.

    Args:
        arrays: the entries by name.
        target: the entry that becomes "label", in place of an entry called "label".
        classes: the names of the label's classes or their number; None finds them out (`labels.encode`).

    Raises:
        DataError: there are no arrays, or they differ in their number of examples.

    Example:
        >>> source = from_arrays({"x": np.zeros((3, 2)), "y": [0, 2, 1]}, "y", None)
        >>> source.features["label"].num_classes
        3
    """
    if not arrays:
        raise DataError("no arrays were given; at least one entry is needed")
    stacked: dict[str, Any] = {}
    features: dict[str, Feature] = {}
    for name, values in rename(arrays, target, classes).items():
        if name == "label":
            stacked[name], features[name] = encode(values, classes)
            continue
        stacked[name], features[name] = _entry(name, values)
    if "weight" in stacked:
        stacked["weight"], features["weight"] = weights(stacked["weight"])
    _check_lengths(stacked)
    return ArraySource(stacked, features)


def from_tuple(parts: tuple, classes: Classes) -> ArraySource:
    """A source of a tuple (inputs,), (inputs, labels) or (inputs, labels, weights).

    Pillow images and inputs of shape `(examples, height, width, channels)` become "image", others "features". If inputs
    are a data frame, the feature keeps the names of its columns.
    """
    if not 1 <= len(parts) <= 3:
        raise ConfigError(
            f"a tuple of {len(parts)} was given; (inputs, labels) or (inputs, labels, weights) is expected"
        )
    pictures, frame = _are_pictures(parts[0]), is_frame(parts[0])
    inputs = parts[0] if pictures or frame else array("the first of the tuple", parts[0])
    names = ("image" if pictures or (not frame and inputs.ndim == 4) else "features", "label", "weight")
    return from_arrays(dict(zip(names, (inputs, *parts[1:]), strict=False)), None, classes)


def _entry(name: str, values: Any) -> tuple[np.ndarray | ImageColumn, Feature]:
    """One entry with its feature. An array in a file is not loaded, so it keeps its dtype."""
    if _are_pictures(values):
        pictures = ImageColumn(values, lambda index: f"{name} of example {index}")
        return pictures, pictures.feature
    if is_frame(values):
        return inputs_of(values, name)
    values = rows(name, values)
    if on_disk(values):
        return values, infer(to_device_dtype(name, values[:1]))
    values = to_device_dtype(name, values, "example {}".format)
    return values, infer(values)


def _are_pictures(values: Any) -> bool:
    """Whether this is a list of Pillow images, judged by its first value."""
    return isinstance(values, list | tuple) and any(map(is_picture, values[:1]))


def _check_lengths(arrays: Mapping[str, Any]) -> None:
    """Raise `DataError` if arrays differ in their number of examples."""
    lengths = {name: len(a) for name, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{n} has {length}" for n, length in lengths.items())
        raise DataError(f"the arrays differ in their number of examples: {said}")


def from_file(path: Path, target: str | None, classes: Classes) -> ArraySource:
    """A source of the arrays of an .npz file. Pickled objects are never read.

    Raises `DataError` if the file is damaged, or would unpack to far more memory than its size.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(part.file_size for part in packed.infolist())
        check_unpacked(path, size, f"load(dict(np.load({path.name!r})))")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        empty = next((name for name, x in arrays.items() if x.ndim and len(x) and not x.nbytes), None)
        if empty is not None:
            raise DataError(f"{empty} of {path} has {len(arrays[empty]):,} examples that hold nothing")
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise exceptions of many types on a damaged file
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as npz: {cause}") from error
    return from_arrays(arrays, target, classes)
