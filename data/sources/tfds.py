"""A source of TensorFlow Datasets (TFDS): prepared data sets are read by random access, without TensorFlow.

A data set that is not prepared yet is downloaded and prepared if that is possible here; else the error says how to get
it. The files of a prepared set name Python classes; only those of TFDS and of trusted packages are imported.
"""

import contextlib
import difflib
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import DataError, SapwoodError
from sapwood.core.trusted_packages import Trust, is_in_packages, refusal, trusted
from sapwood.data.check import stack
from sapwood.data.feature import RAW, TEXT, Feature, to_device_dtype
from sapwood.data.file_checks import check_regular_file
from sapwood.data.prepared_directory import data_directory
from sapwood.data.sources.labels import rename
from sapwood.data.sources.source import CHUNK, THREADS, Source

# preparing these features needs TensorFlow, to encode them; reading them needs only Pillow, but is slow
NEED_TENSORFLOW = ("Image", "LabeledImage", "Video", "Audio", "BBoxFeature")
PROBE_SECONDS = 5.0
FEATURES = "tensorflow_datasets.core.features"


class PreparedSplit(Source):
    """A source of one split of a prepared data set. Nested entries are named by their path, such as "objects/bbox".

    Args:
        builder: the TFDS builder.
        split: the split, also as "train[:80%]" or "train+test"; None is "train".
        target: the entry that becomes "label", in place of an entry called "label".

    Raises:
        DataError: there is no such split, the files are damaged, or their format has no random access.
    """

    def __init__(self, builder: Any, split: str | None, target: str | None):
        self.builder, self.split, self.target = builder, split or "train", target
        self.rows = self._open()
        features = _describe("", builder.info.features)
        # sorted, since TFDS reads the features from a protobuf map, whose order varies
        self.features = rename(dict(sorted(features.items())), target, where=builder.name)
        self._text = [n for n, f in features.items() if f.dtype == TEXT]
        self.threads = THREADS if any(_is_large_image(f) for f in features.values()) else 1

    def _open(self, **options: Any) -> Any:
        """The rows of the split; errors of TFDS become `DataError`."""
        try:
            return self.builder.as_data_source(self.split, **options)
        except NotImplementedError as error:
            form = getattr(self.builder.info.file_format, "value", "a format")
            raise DataError(
                f"{self.builder.name} is prepared as {form} in {self.builder.data_dir}, which has no random access; "
                f"prepare it again elsewhere: tfds build {self.builder.name} --file_format={_format()} --data_dir=DIR, "
                "and give data_dir=DIR"
            ) from error
        except (ValueError, KeyError) as error:
            splits = ", ".join(self.builder.info.splits)
            raise DataError(f"{self.builder.name} has no split {self.split!r}; it has {splits}") from error
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        """The error for files that cannot be read."""
        return DataError(
            f"the files of {self.builder.name} in {self.builder.data_dir} cannot be read "
            f"({_first_line(error)}); delete that folder and prepare it again"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> dict[str, Any]:
        return self._examples(self.rows, [index])[0]

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        numbers = [int(i) for i in indices]
        parts = self.in_parts(lambda part: self._examples(self.rows, part), numbers)
        return stack(parts, numbers, self.where)

    def _examples(self, rows: Any, numbers: list[int]) -> list[dict[str, Any]]:
        """The examples with the indices `numbers`, each as a flat dict of its entries."""
        try:
            found = rows.__getitems__(numbers)
        except Exception as error:  # protobuf, TFDS and Pillow raise exceptions of many types on damaged examples
            raise self._damaged(error) from error
        return [self._entries(example) for example in found]

    def _entries(self, example: Any) -> dict[str, Any]:
        """An example as a flat dict, with text decoded and the target renamed."""
        flat = _flat("", example)
        for name in self._text:
            if isinstance(flat.get(name), bytes):
                flat[name] = flat[name].decode()
        return flat if self.target is None else rename(flat, self.target)

    def column(self, name: str) -> np.ndarray:
        stored = self.target if name == "label" and self.target is not None else name
        if "/" in stored:
            return super().column(name)
        import tensorflow_datasets as tfds

        entries = self.builder.info.features
        others = [n for n in entries if n != stored and type(entries[n]).__name__ in NEED_TENSORFLOW]
        rows = self._open(decoders={n: tfds.decode.SkipDecoding() for n in others})
        parts = np.array_split(np.arange(len(self)), -(-len(self) // CHUNK))  # bounds the memory of the other entries
        values = [{name: e[name]} for part in parts for e in self._examples(rows, part.tolist())]
        return stack(values, range(len(self)), self.where)[name]


def from_catalog(
    name: str,
    split: str | None,
    target: str | None,
    data_dir: str | Path | None,
    trust: Trust | None = None,
) -> PreparedSplit:
    """A source of the data set with a TFDS name. It is prepared first if necessary.

    Args:
        name: a TFDS name, such as "mnist", "glue/cola" or "mnist:3.0.1".
        split: as in `PreparedSplit`.
        target: as in `PreparedSplit`.
        data_dir: the directory of prepared data sets; default `data_directory()`.
        trust: packages, besides TFDS's own, from which feature classes may be imported.

    Raises:
        DataError: there is no such data set, or it cannot be prepared here.
    """
    names = trusted(trust or ())
    found = _find(name, data_dir, names) or _prepare(name, data_directory(data_dir), names)
    return PreparedSplit(found, split, target)


def from_prepared(folder: Path, split: str | None, target: str | None, trust: Trust | None = None) -> PreparedSplit:
    """A source of the prepared data set in `folder`, which has the file `dataset_info.json`.

    The other arguments are those of `from_catalog`. Raises `DataError` if the folder holds no prepared data set.
    """
    import tensorflow_datasets as tfds

    names = trusted(trust or ())
    for path in folder.iterdir():
        if not path.is_dir():
            check_regular_file(path)
    try:
        with _only_features_of(names):
            builder = tfds.builder_from_directory(str(folder))
        return PreparedSplit(builder, split, target)
    except SapwoodError:
        raise
    except Exception as error:  # TFDS, protobuf and JSON raise exceptions of many types on other files
        raise DataError(f"{folder} holds no prepared data set: {_first_line(error)}") from error


_opening = threading.RLock()


@contextlib.contextmanager
def _only_features_of(trust: Sequence[str]) -> Iterator[None]:
    """A context in which TFDS imports feature classes only from its own and from trusted packages.

    A prepared data set names the class of each feature, and TFDS would import the module of any class that it does not
    know yet. The context replaces the method of TFDS that looks classes up; a lock keeps it to one thread at a time.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    connector: Any = FeatureConnector  # Any, since type checkers refuse to replace a method
    known = connector.__dict__["cls_from_name"]

    def cls_from_name(cls: Any, name: str) -> Any:
        module = str(name).rpartition(".")[0]
        if name not in cls._registered_features and not is_in_packages((FEATURES, *trust), module):
            raise DataError(refusal(f"the feature class {name!r:.80} of the data", module, "load"))
        return known.__func__(cls, name)

    with _opening:
        connector.cls_from_name = classmethod(cls_from_name)
        try:
            yield
        finally:
            connector.cls_from_name = known


def _first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _find(name: str, data_dir: str | Path | None, trust: Sequence[str]) -> Any:
    """The builder of a data set that is prepared already, or None. `DataError` if its files cannot be read."""
    from tensorflow_datasets.core import read_only_builder, registered

    # without data_dir=, data sets that TFDS prepared in its default directory are found, too
    places = [data_directory(data_dir)] if data_dir else [data_directory(), Path.home() / "tensorflow_datasets"]
    for place in dict.fromkeys(places):
        try:
            with _only_features_of(trust):
                return read_only_builder.builder_from_files(name, data_dir=str(place))
        except registered.DatasetNotFoundError:
            continue
        except SapwoodError:
            raise
        except Exception as error:  # TFDS, protobuf and JSON raise exceptions of many types on other files
            raise DataError(f"the files of {name} in {place} cannot be read: {_first_line(error)}") from error
    return None


def _prepare(name: str, place: Path, trust: Sequence[str]) -> Any:
    """Download and prepare a data set, and return its builder. A `DataError` says how to get it if that fails."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        builder = tfds.builder(name, data_dir=str(place), file_format=_format())
    except DatasetNotFoundError:
        raise _unknown(name) from None
    except Exception as error:  # the builder's own code runs here, and may raise any exception
        raise DataError(f"{name} cannot be opened: {_first_line(error)}") from error
    how = _how(name, place)
    if _needs_tensorflow(builder) and find_spec("tensorflow") is None:
        raise DataError(
            f"{name} is not prepared in {place}, and preparing it takes TensorFlow, which is not installed. {how}"
        )
    reason = _unreachable(builder)
    if reason is not None:
        raise DataError(f"{name} is not prepared in {place}, and its source cannot be reached ({reason}). {how}")
    try:
        builder.download_and_prepare()
    except Exception as error:  # the builder's own code runs here, and may raise any exception
        found = _find(name, place, trust)  # another process may have finished first
        if found is not None:
            return found
        raise DataError(f"{name} could not be prepared in {place}: {_first_line(error)}. {how}") from error
    return builder


def _format() -> str:
    """The file format to prepare data sets in: one with random access that can be written here."""
    return "array_record" if find_spec("array_record") is not None else "parquet"


def _how(name: str, place: Path) -> str:
    """Instructions, for messages, to prepare a data set on another machine."""
    return (
        f"On a connected machine with TensorFlow, run `tfds build {name} --file_format={_format()} --data_dir=DIR`, "
        f"copy DIR/{name.split(':')[0].split('/')[0]} to {place}, or give data_dir=DIR (or set SAPWOOD_DATA_DIR)"
    )


def _unknown(name: str) -> DataError:
    """The error for a name that TFDS does not have, with the nearest names."""
    import tensorflow_datasets as tfds

    known = ["digits", *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(re.split("[/:]", name)[0], known, n=3)
    hint = f"the nearest names are {', '.join(map(repr, near))}" if near else "TFDS has no name like it"
    return DataError(f"there is no file, folder or TensorFlow data set {name!r}; {hint}")


def _needs_tensorflow(builder: Any) -> bool:
    """Whether preparing a data set needs TensorFlow, judged by its features."""
    try:
        return any(name in repr(builder.info.features) for name in NEED_TENSORFLOW)
    except Exception:  # some builders read files to describe their features
        return True


def _unreachable(builder: Any) -> str | None:
    """Why the builder's first download cannot be reached, or None if it can. TFDS itself would retry for minutes."""
    urls = list(builder.url_infos or {})
    if not urls:
        return None
    import requests

    try:
        requests.head(urls[0], timeout=PROBE_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        return f"{urls[0]}: {type(error).__name__}"
    except OSError as error:
        return f"{urls[0]}: {error}"
    return None


def _describe(path: str, feature: Any) -> dict[str, Feature]:
    """Convert the features of TFDS to `Feature`s; nested entries are named by their path, which starts with `path`."""
    name = type(feature).__name__
    if name == "FeaturesDict":
        found: dict[str, Feature] = {}
        for key, inner in feature.items():
            found |= _describe(f"{path}/{key}" if path else key, inner)
        return found
    if not path:
        raise DataError(f"the examples are no dict of entries, but {feature}")
    if name == "ClassLabel":
        names = feature.names if feature.names is not None else None
        return {path: Feature((), "int32", classes=names, num_classes=feature.num_classes)}
    if name == "Text":
        return {path: Feature((), TEXT)}
    return _leaves(path, feature.get_tensor_info(), getattr(feature, "doc", None))


def _leaves(path: str, info: Any, doc: Any) -> dict[str, Feature]:
    """The features of the tensors in a TFDS feature; `doc` is its documentation, which may give a range."""
    if isinstance(info, Mapping):
        found: dict[str, Feature] = {}
        for key, inner in info.items():
            found |= _leaves(f"{path}/{key}", inner, None)
        return found
    dtype = np.dtype(info.np_dtype)
    if dtype.kind in "OSU":
        return {path: Feature((), TEXT) if info.shape == () else Feature(info.shape, RAW)}
    low, high = _range(doc)
    return {path: Feature(tuple(info.shape), to_device_dtype("", np.zeros(0, dtype)).dtype.name, low=low, high=high)}


def _is_large_image(feature: Feature) -> bool:
    """Whether an image is slow enough to decode that threads pay off: at least 64 x 64 pixels, or of unknown size."""
    shape = feature.shape
    return len(shape) >= 3 and (None in shape or math.prod(d or 0 for d in shape[:-1]) >= 64 * 64)


def _range(doc: Any) -> tuple[float | None, float | None]:
    """The value range in a feature's documentation, if it reads like "0..16"; else (None, None)."""
    number = r"(-?\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"{number}\.\.{number}", getattr(doc, "value_range", None) or "")
    if match is None:
        return None, None
    low, high = (float(g) if "." in g else int(g) for g in match.groups())
    return low, high


def _flat(path: str, value: Any) -> dict[str, Any]:
    """Flatten a nested dict; keys become paths that start with `path`."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _flat(f"{path}/{key}" if path else key, inner)
        return found
    return {path: value}
