"""`Folder`: a source of images in one folder per class. Images are decoded when they are read."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.feature import Feature
from sapwood.data.image.column import ImageColumn
from sapwood.data.sources.labels import Classes
from sapwood.data.sources.source import Source

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx", ".jxl", ".bmp", ".dib", ".gif", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".psd", ".dds", ".avif", ".heic", ".heif",
)  # fmt: skip
"""Suffixes of image files. A file with one of them that Pillow cannot read raises an error; none is skipped."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of the folder of each split; upper and lower case are equal."""


class Folder(Source):
    """A source of images by class: `root/cat/1.png` has the label "cat".

    With splits it reads `root/train/cat/1.png`; the folder of a split may also be called "Train" or "training", for
    example. Entry "image" is uint8 `(height, width, channels)`, decoded by `sapwood.data.decode_image`: 1 channel if
    the images of all splits are gray, else 3. Entry "label" is int32. The classes are the sorted names of the folders
    of all splits, so a class has the same number in each split.

    Args:
        root: the folder.
        split: the split to read; None is "train" if there are splits.
        classes: the names of the classes, in order; None takes the folders' names.
        size: (height, width) to resize to, bilinear; None keeps each image's size.

    Raises:
        DataError: there are no images, no such split, or a folder that is not among the classes.
        ConfigError: `classes` is a number.
    """

    def __init__(self, root: Path, split: str | None, classes: Classes, size: tuple[int, int] | None):
        if isinstance(classes, int):
            raise ConfigError(
                "the classes of a folder are the names of its folders; classes= takes names to order them"
            )
        home, homes = _homes(root, split, classes)
        if classes is None:  # a class may be missing from this split
            _refuse_others(homes)
            names = sorted({n for h in homes for n in _classes(h)}, key=Path)
        else:
            unknown = [n for n in _classes(home) if n not in classes]
            if unknown:
                raise DataError(f"{home} has a folder {unknown[0]!r}; classes are {', '.join(map(repr, classes))}")
            names = list(classes)
        self.root = home
        found = [(path, i) for i, name in enumerate(names) for path in _images(home / name)]
        if not found:
            raise DataError(f"no images in {home}; a folder for each class is expected, with .png, .jpg, ... files")
        self.paths = [path for path, _ in found]
        self.labels = np.array([label for _, label in found], np.int32)
        _warn_of_others([home / name for name in names])
        others = (path for h in homes if h != home for name in _classes(h) for path in _images(h / name))
        self.pictures = ImageColumn(self.paths, lambda index: str(self.paths[index]), size=size, beside=others)
        self.features = {
            "image": self.pictures.feature,
            "label": Feature((), "int32", classes=tuple(names)),
        }

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.pictures[index], "label": self.labels[index]}

    def column(self, name: str) -> np.ndarray:
        return self.labels if name == "label" else super().column(name)

    def where(self, index: int) -> str:
        return f"example {index} ({self.paths[index].relative_to(self.root)})"


def _homes(root: Path, split: str | None, classes: Sequence[str] | None) -> tuple[Path, list[Path]]:
    """The folder whose folders are the classes, and the list of such folders of all splits, which includes it.

    Without splits both are `root`. Raises `DataError` for an unknown split, or if it is unclear whether folders are
    splits or classes.
    """
    folders = _folders(root)
    splits = [d for d in folders if _kind(d.name)]
    others = [d.name for d in folders if not _kind(d.name) and _has_images(d)]
    if others:  # beside folders of images, "valid" is a split if it has folders of images in it, else a class
        splits = [d for d in splits if _classes(d)]
    if classes is not None and {*others, *(d.name for d in splits)} <= set(classes):
        splits = []  # "train" may be a class, the vehicle
    if splits and not others:
        return _of_split(root, splits, split or "train"), splits
    mixed = [d.name for d in splits if _has_images(d)]
    if mixed:
        raise DataError(
            f"{root} has folders of splits ({', '.join(mixed)}) beside others ({', '.join(others[:10])}); move one "
            "kind out of it, or, where all of them are classes, name them in classes="
        )
    if split is not None:
        names = ", ".join(d.name for d in folders[:10])
        raise DataError(f"{root} has no split {split!r}; its folders are classes: {names}")
    return root, [root]


def _kind(name: str) -> str | None:
    """The key of `SPLITS` that a folder of this name belongs to, or None."""
    return next((kind for kind, names in SPLITS.items() if name.lower() in names), None)


def _of_split(root: Path, splits: list[Path], wanted: str) -> Path:
    """The folder of a split: the one with exactly that name, else the one with another name for the same split."""
    there = ", ".join(d.name for d in splits)
    found = [d for d in splits if d.name == wanted] or [d for d in splits if _kind(d.name) == _kind(wanted)]
    if len(found) > 1:
        raise DataError(f"{root} has several folders for the split {wanted!r}: {there}; say which with split=")
    if not found:
        raise DataError(f"{root} has no split {wanted!r}; it has {there}")
    return found[0]


def _refuse_others(homes: list[Path]) -> None:
    """Raise `DataError` if a folder among the classes has files but no image.

    Without this error its class would be missing, and the numbers of the classes after it would change.
    """
    for folder in (d for home in homes for d in _folders(home)):
        files = [] if _has_images(folder) else [p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."]
        if files:
            kinds = ", ".join(sorted({path.suffix or path.name for path in files})[:5])
            raise DataError(
                f"{folder} holds no image that is known as one ({kinds}): move it elsewhere if it is no class, convert "
                "its files if it is one, or name the classes with classes="
            )


def _warn_of_others(folders: list[Path]) -> None:
    """Warn, once for all, of files in the folders of classes that are not images; they are skipped."""
    files = [p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.is_file() and not _is_image(p)]
    files = [path for path in files if not path.name.startswith(".") and path.name not in ("Thumbs.db", "desktop.ini")]
    if files:
        kinds = ", ".join(sorted({path.suffix or path.name for path in files})[:5])
        several = f"files ({kinds}) are" if len(files) > 1 else f"file ({kinds}) is"
        warnings.warn(
            f"{len(files)} {several} left out, such as {files[0]}: not known as an image by its ending",
            stacklevel=9,  # where `load` was called
        )


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _classes(home: Path) -> list[str]:
    """The names of the folders in a folder that have images, at any depth."""
    return [d.name for d in _folders(home) if _has_images(d)]


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, folder.rglob("*")))


def _images(folder: Path) -> list[Path]:
    """The images in a folder, at any depth, sorted."""
    return sorted(filter(_is_image, folder.rglob("*"))) if folder.is_dir() else []


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
