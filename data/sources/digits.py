"""`digits`: scikit-learn's 1,797 handwritten digits, prepared once as a TensorFlow data set.

Preparing writes array_record files with their checksums. If they cannot be written or read back, the digits come from
scikit-learn instead.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49 (CC BY 4.0); the part that scikit-learn ships as `load_digits`.
"""

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.feature import Feature
from sapwood.data.prepared_directory import data_directory
from sapwood.data.sources.source import ArraySource, Source

VERSION = "1.0.0"
SUMS = "SHA256SUMS"  # of the prepared files, as `sha256sum --check` reads them
FEATURES = {
    "image": Feature((8, 8, 1), "uint8", low=0, high=16),
    "label": Feature((), "int32", classes=tuple("0123456789")),
}
STALE_SECONDS = 3600  # the age at which the files of an interrupted preparation are removed


def digits(split: str | None = None, data_dir: str | Path | None = None) -> Source:
    """The digits as a source: "image", uint8 `(8, 8, 1)` with values 0..16, and "label", int32, 0..9.

    "train" has 1,437 examples and "test" 360: scikit-learn's
    `train_test_split(X, y, test_size=0.2, stratify=y, random_state=0)`, in that order.

    They are prepared once into `data_dir` in array_record format, as `digits/1.0.0`. If array_record is not installed
    (it has no wheel for Windows), they come from scikit-learn each time. The same happens, with a warning, if the
    directory cannot be written or a prepared file is damaged.

    Args:
        split: "train" (the default), "test", or slices of them as in TFDS, such as "train[:80%]+test".
        data_dir: the directory of prepared data sets; default `data_directory()`.

    Raises:
        DataError: there is no such split, or scikit-learn is not installed.
    """
    if find_spec("array_record") is None:
        return _in_memory(split)
    place = data_directory(data_dir)
    try:
        folder = prepare(place)
    except OSError as error:
        warnings.warn(
            f"digits cannot be prepared in {place} ({error.strerror or error}), so it is read from scikit-learn, which "
            "takes seconds each time; set SAPWOOD_DATA_DIR to a directory that can be written",
            stacklevel=2,
        )
        return _in_memory(split)
    if wrong := _changed(folder):
        warnings.warn(
            f"digits in {folder} are damaged ({', '.join(wrong)} read back other than written), so they are read from "
            "scikit-learn; delete that folder, and they are prepared anew",
            stacklevel=2,
        )
        return _in_memory(split)
    from sapwood.data.sources.tfds import from_prepared

    return from_prepared(folder, split, None)


def prepare(place: Path) -> Path:
    """The folder of the prepared digits inside `place`. It prepares them if they are not there.

    The folder is written under another name, and renamed once all files are on disk, so it is never incomplete. An
    interrupted preparation leaves no files that are read as data. If two processes prepare at once, the first one's
    files stay.
    """
    final = place / "digits" / VERSION
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final.parent)
    work = Path(tempfile.mkdtemp(prefix="incomplete.", dir=final.parent))
    try:
        made = _write(work)
        try:
            os.rename(made, final)
        except OSError:
            if not final.exists():  # if it exists, another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _write(work: Path) -> Path:
    """Prepare the digits below `work`, with checksums, and wait until they are on disk; returns their folder."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = _builder_class()(data_dir=str(work), file_format="array_record")
    with open(os.devnull, "w") as silence, _stdout(silence):
        builder.download_and_prepare(download_dir=str(work / "downloads"))
    made = Path(builder.data_dir)
    sums = "".join(f"{_sum(path)}  {path.name}\n" for path in sorted(made.iterdir()))
    (made / SUMS).write_text(sums)
    for path in made.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return made


def _changed(folder: Path) -> list[str]:
    """The names of prepared files whose checksum is wrong. Files prepared by version 0.1 have no checksums and pass."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        return [name for total, _, name in (line.partition("  ") for line in lines) if total != _sum(folder / name)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return [SUMS]


def _sum(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; empty if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _stdout(target: Any) -> Any:
    """A context in which standard output goes to `target`."""
    from contextlib import redirect_stdout

    return redirect_stdout(target)


def _sweep(folder: Path) -> None:
    """Remove what interrupted preparations left, once it is `STALE_SECONDS` old."""
    for left in folder.glob("incomplete.*"):
        try:
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # another process removed it


@cache
def _builder_class() -> Any:
    """The TFDS builder class of the digits. It is made inside a function because TFDS is imported on first use."""
    import tensorflow_datasets as tfds

    class Digits(tfds.core.GeneratorBasedBuilder):
        """scikit-learn's handwritten digits. `Tensor` and not `Image`, which would need TensorFlow to be prepared."""

        VERSION = tfds.core.Version(VERSION)
        RELEASE_NOTES: ClassVar = {str(VERSION): "scikit-learn's digits, split 80/20 by class."}
        pkg_dir_path = tfds.core.Path(__file__).parent  # TFDS looks for metadata files there, and finds none

        def _info(self) -> Any:
            image = tfds.features.Tensor(
                shape=(8, 8, 1),
                dtype=np.uint8,
                doc=tfds.features.Documentation(desc="Pixels set in each 4 x 4 block.", value_range="0..16"),
            )
            return tfds.core.DatasetInfo(
                builder=self,
                description="1,797 handwritten digits of 43 people, 8 x 8 pixels, from UCI's optdigits test set.",
                features=tfds.features.FeaturesDict(
                    {"image": image, "label": tfds.features.ClassLabel(names=list("0123456789"))}
                ),
                supervised_keys=("image", "label"),
                homepage="https://doi.org/10.24432/C50P49",
                citation="E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI, 1998.",
                disable_shuffling=True,  # the order of the split is part of the set
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {name: self._generate_examples(*arrays) for name, arrays in _from_sklearn().items()}

        def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Any:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": image, "label": int(label)}

    return Digits


def _from_sklearn() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 `(examples, 8, 8, 1)` and labels int32 `(examples,)` of each split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("preparing digits takes scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = (np.asarray(p) for p in parts)
    shaped = {"train": (train, train_labels), "test": (test, test_labels)}
    return {n: (x.reshape(-1, 8, 8, 1).astype(np.uint8), y.astype(np.int32)) for n, (x, y) in shaped.items()}


def _in_memory(split: str | None) -> ArraySource:
    """The digits from scikit-learn, without prepared files."""
    splits = _from_sklearn()
    parts = [(name, slice(None)) for name in splits if name == (split or "train")] or _slices(split or "train", splits)
    images, labels = (np.concatenate([splits[name][i][cut] for name, cut in parts]) for i in (0, 1))
    return ArraySource({"image": images, "label": labels}, dict(FEATURES))


def _slices(split: str, splits: dict[str, Any]) -> list[tuple[str, slice]]:
    """The splits and their slices that a TFDS text such as "train[:80%]+test" stands for."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitInfo

    infos = {n: SplitInfo(name=n, shard_lengths=[len(y)], num_bytes=0) for n, (_, y) in splits.items()}
    try:
        found = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, KeyError, AssertionError):
        raise DataError(f"digits has no split {split!r}; it has {', '.join(splits)}") from None
    return [(part.splitname, slice(part.from_, part.to)) for part in found]
