"""`load`: a `Dataset` from any kind of data.

`_open`, `_named`, `_folder` and `_file` choose the source by the type of the argument, or by what is at a path. Each
source takes only some of the options; `_with` raises an error for the others. A new kind of source is added here and as
a file in `sources/`.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError, DataError
from sapwood.core.trusted_packages import Trust
from sapwood.data.dataset import Dataset
from sapwood.data.file_checks import check_regular_file
from sapwood.data.image.decode import is_picture
from sapwood.data.sources.source import Source

TABLES = (".csv", ".tsv", ".parquet", ".pq")
TABLE_OPTIONS = ("target", "classes", "weight", "columns")
CATALOG_NAME = r"[A-Za-z_][\w-]*(:[\w.*-]+)?(/[\w.*+=,-]+)*(:[\d.*]+)?"
"""Pattern of names in TensorFlow Datasets: "mnist", "glue/cola", "mnist:3.0.1", "huggingface:mnist"."""


@migration_hints.answering("load", migration_hints.LOAD)
def load(
    source: Any,
    split: str | None = None,
    *,
    validation: float = 0.0,
    seed: int = 0,
    target: str | None = None,
    classes: int | Sequence[str] | None = None,
    weight: str | None = None,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    size: int | tuple[int, int] | None = None,
    remember: bool | None = None,
    data_dir: str | Path | None = None,
    trust: Trust | None = None,
) -> Any:
    """Load a `Dataset` from `source`; with `validation`, a pair of data sets.

    | source | entries | options |
    |---|---|---|
    | "digits" | image, label | split, data_dir |
    | a TensorFlow data set: "mnist", "glue/cola", "mnist:3.0.1" | its own | split, target, data_dir, trust |
    | a folder with `dataset_info.json` | its own | split, target, trust |
    | a folder of images by class | image, label | split, classes, size |
    | .csv, .tsv, .parquet; a frame of pandas, polars, ... | features, label, ... | target, classes, weight, columns |
    | a file .npz, or a dict of arrays or lists of Pillow images | its own | target, classes |
    | (inputs, labels), (inputs, labels, weights), or an array | features (image if 4-D), label, weight | classes |
    | a `datasets.Dataset` or a dict of them by split | its own | split, target, classes, remember |
    | anything with `__len__` and `__getitem__` | its own | target, classes, remember |
    | a custom `Source`, or a `Dataset` | its own | |

    Args:
        source: as above. A path that exists is read as a file or folder; any other text is the name of a TensorFlow
            data set.
        split: the split to load, default "train"; TFDS also takes "train[:80%]" and "train+test".
        validation: the fraction to hold out, 0 for none, in proportion for each class (`Dataset.split`). If it is above
            0, the result is a pair: the rest, and the held-out part.
        seed: the seed of the draw of the held-out part.
        target: the entry that becomes "label". Another entry called "label" is then left out.
        classes: the names of the label's classes in order, or their number, if the source does not say.
        weight: the column of sample weights.
        columns: the columns of a table to read besides target and weight, in this order; default all. The index of a
            pandas data frame is left out.
        header: whether the first line of a CSV file names its columns; default True. With False they are called "0",
            "1", ... If the first line has numbers in it and neither the target nor the weight, this must be given.
        size: (height, width) to resize images to; one number is both.
        remember: whether examples stay in memory once they are read, if all of them fit into 1 GB. By default an object
            with `__getitem__`, such as a PyTorch data set, is read each time unless it is a list, and so is a
            `datasets.Dataset` with a transform, because either may be random. Set True if examples are the same each
            time and slow to read.
        data_dir: the directory of prepared data sets; default $SAPWOOD_DATA_DIR, $TFDS_DATA_DIR, ~/tensorflow_datasets.
        trust: packages, besides TFDS's own, from which the feature classes of a prepared set may be imported.

    Raises:
        DataError: there is no such data, it is empty or damaged, or it cannot be obtained here. The message says how
            to get it.
        ConfigError: an option that this kind of source does not take.

    Example:
        >>> import numpy as np
        >>> train, valid = load((np.zeros((50, 3)), np.arange(50) % 5), validation=0.2)
        >>> len(train), len(valid), train.features["label"].num_classes
        (40, 10, 5)
    """
    if isinstance(size, int):
        size = (size, size)
    if isinstance(classes, np.ndarray | np.generic):
        classes = classes.tolist()
    options = {
        "split": split,
        "target": target,
        "classes": classes,
        "weight": weight,
        "columns": columns,
        "header": header,
        "size": size,
        "remember": remember,
        "data_dir": data_dir,
        "trust": trust,
    }
    if isinstance(source, Dataset):
        data = _with(options, "a Dataset", lambda: source)
    else:
        data = Dataset.over(_open(source, options))
    if not 0 <= validation < 1:
        raise ConfigError(f"validation is the fraction of examples to hold out, 0 to below 1, not {validation}")
    return data.split(validation, seed=seed) if validation else data


def _with(options: Mapping[str, Any], kind: str, open_it: Callable[..., Any], *takes: str) -> Any:
    """Call `open_it` with the options it takes; `ConfigError` if any other option was given.

    Args:
        options: all options of `load`; None means not given.
        kind: what the message calls the source.
        open_it: the function that opens the source.
        takes: the names of the options that it takes.
    """
    for name, value in options.items():
        if value is not None and name not in takes:
            said = f"it takes {', '.join(f'{t}=' for t in takes)}" if takes else "it takes no options"
            raise ConfigError(f"{name}={value!r} says nothing about {kind}; {said}")
    return open_it(**{name: options[name] for name in takes})


def _open(source: Any, options: Mapping[str, Any]) -> Source:
    """The source of an object or a name, by its type. The order of the tests matters: a frame has `__len__`, too."""
    from sapwood.data.sources import arrays, huggingface, random_access, table

    if isinstance(source, Source):
        return _with(options, "a Source", lambda: source)
    if isinstance(source, str | os.PathLike):
        return _named(os.fspath(source), options)
    if huggingface.is_hub(source):
        return _with(
            options, "a datasets.Dataset", _on(huggingface.from_hub, source), "split", "target", "classes", "remember"
        )
    if table.is_frame(source):
        return _with(options, "a data frame", _on(table.from_frame, source), *TABLE_OPTIONS)
    if isinstance(source, Mapping):
        return _with(options, "a dict of arrays", _on(arrays.from_arrays, source), "target", "classes")
    if isinstance(source, tuple):
        return _with(options, "a tuple of arrays", _on(arrays.from_tuple, source), "classes")
    if hasattr(source, "__array__") or hasattr(source, "toarray") or hasattr(source, "todense"):  # or a sparse one
        return _with(options, "an array", _on(arrays.from_tuple, (source,)), "classes")
    if isinstance(source, list) and source and is_picture(source[0]):
        return _with(options, "pictures", _on(arrays.from_tuple, (source,)), "classes")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        kind = type(source).__name__
        return _with(options, kind, _on(random_access.Indexed, source), "target", "classes", "remember")
    raise DataError(
        f"{type(source).__name__} cannot be read; a name, a path, arrays, or an object with __len__ and __getitem__ is "
        "expected (an iterator has no random access: make a list of it)"
    )


def _on(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function with its positional arguments filled in, so that it takes only options."""
    return lambda **options: function(*args, **options)


def _named(name: str, options: Mapping[str, Any]) -> Source:
    """The source of a text: "digits", a path, or the name of a TensorFlow data set."""
    if name == "digits":
        from sapwood.data.sources.digits import digits

        return _with(options, "digits", digits, "split", "data_dir")
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, options)
    if path.is_file() or path.suffix.lower() in (*TABLES, ".npz"):
        return _file(path, options)
    if not re.fullmatch(CATALOG_NAME, name):  # such as "C:/data", "~/data", "s3://bucket/data", "old data"
        raise DataError(f"there is no file or folder {name!r}")
    from sapwood.data.sources.tfds import from_catalog

    return _with(options, "a TensorFlow data set", _on(from_catalog, name), "split", "target", "data_dir", "trust")


def _folder(path: Path, options: Mapping[str, Any]) -> Source:
    """The source of a folder: a prepared TensorFlow data set, else images by class."""
    if (path / "dataset_info.json").exists():
        from sapwood.data.sources.tfds import from_prepared

        return _with(options, "a prepared data set", _on(from_prepared, path), "split", "target", "trust")
    from sapwood.data.sources.image_folder import Folder

    return _with(options, "a folder of images", _on(Folder, path), "split", "classes", "size")


def _file(path: Path, options: Mapping[str, Any]) -> Source:
    """The source of a file, by its suffix."""
    from sapwood.data.sources import arrays, table

    if not path.exists():
        raise DataError(f"there is no file {path}")
    check_regular_file(path)
    if path.suffix.lower() in TABLES:
        return _with(options, "a table", _on(table.from_file, path), *TABLE_OPTIONS, "header")
    if path.suffix.lower() == ".npz":
        return _with(options, "arrays", _on(arrays.from_file, path), "target", "classes")
    hint = "sapwood.data.characters makes data of a text; " if path.suffix in (".txt", ".md") else ""
    raise DataError(f"{path} is of no known kind; {hint}files read here are {', '.join((*TABLES, '.npz'))}")
