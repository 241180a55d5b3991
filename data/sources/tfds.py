"""TensorFlow Datasets: prepared sets are read by random access, without TensorFlow."""

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
from sapwood.core.trusted_packages import Trust, covers, refusal, trusted
from sapwood.data.check import stack
from sapwood.data.feature import RAW, TEXT, Feature, narrow
from sapwood.data.file_checks import check_ordinary
from sapwood.data.prepared_directory import data_directory
from sapwood.data.sources.labels import rename
from sapwood.data.sources.source import CHUNK, THREADS, Source

# TensorFlow encodes these when a set is prepared; reading them needs only Pillow, and takes time
NEED_TENSORFLOW = ("Image", "LabeledImage", "Video", "Audio", "BBoxFeature")
PROBE_SECONDS = 5.0
FEATURES = "tensorflow_datasets.core.features"


class Catalog(Source):
    """One split of a prepared set. Nested entries are named by their path, "objects/bbox"; the entry `target` is
    called "label", in place of one that has that name."""

    def __init__(self, builder: Any, split: str | None, target: str | None):
        self.builder, self.split, self.target = builder, split or "train", target
        self.rows = self._open()
        features = _describe("", builder.info.features)
        # sorted, since TFDS reads the features of a prepared set from a protobuf map, in another order each time
        self.features = rename(dict(sorted(features.items())), target, where=builder.name)
        self._text = [n for n, f in features.items() if f.dtype == TEXT]
        self.threads = THREADS if any(_is_large_image(f) for f in features.values()) else 1

    def _open(self, **options: Any) -> Any:
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
        try:
            found = rows.__getitems__(numbers)
        except Exception as error:  # whatever protobuf, TFDS and Pillow raise on what is no example
            raise self._damaged(error) from error
        return [self._entries(example) for example in found]

    def _entries(self, example: Any) -> dict[str, Any]:
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
        parts = np.array_split(np.arange(len(self)), -(-len(self) // CHUNK))  # the other entries of so many at once
        values = [{name: e[name]} for part in parts for e in self._examples(rows, part.tolist())]
        return stack(values, range(len(self)), self.where)[name]


def from_catalog(
    name: str,
    split: str | None,
    target: str | None,
    data_dir: str | Path | None,
    trust: Trust | None = None,
) -> Catalog:
    """The set of that TFDS name, "mnist", "glue/cola" or "mnist:3.0.1"; prepared first where that can be done here."""
    names = trusted(trust or ())
    found = _find(name, data_dir, names) or _prepare(name, data_directory(data_dir), names)
    return Catalog(found, split, target)


def from_prepared(folder: Path, split: str | None, target: str | None, trust: Trust | None = None) -> Catalog:
    """The prepared set in `folder`, the one with `dataset_info.json`."""
    import tensorflow_datasets as tfds

    names = trusted(trust or ())
    for path in folder.iterdir():
        if not path.is_dir():
            check_ordinary(path)
    try:
        with _only_features_of(names):
            builder = tfds.builder_from_directory(str(folder))
        return Catalog(builder, split, target)
    except SapwoodError:
        raise
    except Exception as error:  # whatever TFDS, protobuf and JSON raise on files that are not theirs
        raise DataError(f"{folder} holds no prepared data set: {_first_line(error)}") from error


_opening = threading.RLock()


@contextlib.contextmanager
def _only_features_of(trust: Sequence[str]) -> Iterator[None]:
    """Within the block, TFDS imports no class of features but its own and those of trusted packages.

    A prepared set names the class of each feature, and TFDS imports the module of any that it does not know yet.
    """
    from tensorflow_datasets.core.features.feature import FeatureConnector

    connector: Any = FeatureConnector  # to the types, the method that is replaced is fixed
    known = connector.__dict__["cls_from_name"]

    def cls_from_name(cls: Any, name: str) -> Any:
        module = str(name).rpartition(".")[0]
        if name not in cls._registered_features and not covers((FEATURES, *trust), module):
            raise DataError(refusal(f"the feature class {name!r:.80} of the data", module, "load"))
        return known.__func__(cls, name)

    with _opening:
        connector.cls_from_name = classmethod(cls_from_name)
        try:
            yield
        finally:
            connector.cls_from_name = known


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _find(name: str, data_dir: str | Path | None, trust: Sequence[str]) -> Any:
    from tensorflow_datasets.core import read_only_builder, registered

    # without data_dir=, sets prepared by TFDS itself are found too
    places = [data_directory(data_dir)] if data_dir else [data_directory(), Path.home() / "tensorflow_datasets"]
    for place in dict.fromkeys(places):
        try:
            with _only_features_of(trust):
                return read_only_builder.builder_from_files(name, data_dir=str(place))
        except registered.DatasetNotFoundError:
            continue
        except SapwoodError:
            raise
        except Exception as error:  # whatever TFDS, protobuf and JSON raise on files that are not theirs
            raise DataError(f"the files of {name} in {place} cannot be read: {_first_line(error)}") from error
    return None


def _prepare(name: str, place: Path, trust: Sequence[str]) -> Any:
    """Download and prepare a set, or a DataError that says how to get it."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        builder = tfds.builder(name, data_dir=str(place), file_format=_format())
    except DatasetNotFoundError:
        raise _unknown(name) from None
    except Exception as error:  # a builder's own code runs here, and may raise anything
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
    except Exception as error:  # a builder's own code runs here, and may raise anything
        found = _find(name, place, trust)  # another process may have finished first
        if found is not None:
            return found
        raise DataError(f"{name} could not be prepared in {place}: {_first_line(error)}. {how}") from error
    return builder


def _format() -> str:
    return "array_record" if find_spec("array_record") is not None else "parquet"


def _how(name: str, place: Path) -> str:
    return (
        f"On a connected machine with TensorFlow, run `tfds build {name} --file_format={_format()} --data_dir=DIR`, "
        f"copy DIR/{name.split(':')[0].split('/')[0]} to {place}, or give data_dir=DIR (or set SAPWOOD_DATA_DIR)"
    )


def _unknown(name: str) -> DataError:
    import tensorflow_datasets as tfds

    known = ["digits", *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(re.split("[/:]", name)[0], known, n=3)
    hint = f"the nearest names are {', '.join(map(repr, near))}" if near else "TFDS has no name like it"
    return DataError(f"there is no file, folder or TensorFlow data set {name!r}; {hint}")


def _needs_tensorflow(builder: Any) -> bool:
    try:
        return any(name in repr(builder.info.features) for name in NEED_TENSORFLOW)
    except Exception:  # some builders read files to describe their features
        return True


def _unreachable(builder: Any) -> str | None:
    """Why the builder's first download cannot be reached, or None: asked before TFDS would wait and try for minutes."""
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
    """TFDS's description of the entries, nested ones by their path."""
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
    if isinstance(info, Mapping):
        found: dict[str, Feature] = {}
        for key, inner in info.items():
            found |= _leaves(f"{path}/{key}", inner, None)
        return found
    dtype = np.dtype(info.np_dtype)
    if dtype.kind in "OSU":
        return {path: Feature((), TEXT) if info.shape == () else Feature(info.shape, RAW)}
    low, high = _range(doc)
    return {path: Feature(tuple(info.shape), narrow("", np.zeros(0, dtype)).dtype.name, low=low, high=high)}


def _is_large_image(feature: Feature) -> bool:
    """Whether decoding one takes so long that several threads are faster: from 64 x 64 on, and where that varies."""
    shape = feature.shape
    return len(shape) >= 3 and (None in shape or math.prod(d or 0 for d in shape[:-1]) >= 64 * 64)


def _range(doc: Any) -> tuple[float | None, float | None]:
    """A feature's documented value range, where it reads "0..16"."""
    number = r"(-?\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"{number}\.\.{number}", getattr(doc, "value_range", None) or "")
    if match is None:
        return None, None
    low, high = (float(g) if "." in g else int(g) for g in match.groups())
    return low, high


def _flat(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _flat(f"{path}/{key}" if path else key, inner)
        return found
    return {path: value}
