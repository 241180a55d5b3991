"""A folder of images, one folder a class inside it, read when they are asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.features import Feature
from sapwood.data.source import Source
from sapwood.data.sources.labels import Classes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "validation", "valid", "val", "test")


class Folder(Source):
    """Images by class: `root/cat/1.png` has label "cat"; or `root/train/cat/1.png` with split "train".

    Images are "image", uint8 `(height, width, channels)`, with 1 channel where the first image is grey and 3
    otherwise, and resized to `size` (bilinear) where that is given. Classes are the folders' names in order, those of
    all splits, so that a class has one number in each.
    """

    def __init__(self, root: Path, split: str | None, classes: Classes, size: tuple[int, int] | None):
        if isinstance(classes, int):
            raise ConfigError(
                "the classes of a folder are the names of its folders; classes= takes names to order them"
            )
        home, homes = _homes(root, split, classes)
        if classes is None:  # a class may be missing from this split
            names = sorted({n for h in homes for n in _classes(h)}, key=Path)
        else:
            unknown = [n for n in _classes(home) if n not in classes]
            if unknown:
                raise DataError(f"{home} has a folder {unknown[0]!r}; classes are {', '.join(map(repr, classes))}")
            names = list(classes)
        self.root, self.size = home, size
        found = [(path, i) for i, name in enumerate(names) for path in _images(home / name)]
        if not found:
            raise DataError(
                f"no images in {home}; a folder for each class is expected, with {', '.join(SUFFIXES[:3])}, ... files"
            )
        self.paths = [path for path, _ in found]
        self.labels = np.array([label for _, label in found], np.int32)
        self.grey = _is_grey(self.paths[0])
        height, width = size or _common_size(self.paths)
        shape = (height, width, 1 if self.grey else 3)
        self.features = {
            "image": Feature(shape, "uint8", low=0, high=255),
            "label": Feature((), "int32", classes=tuple(names)),
        }

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> dict[str, np.ndarray]:
        image = decode(self.paths[index], grey=self.grey, size=self.size)
        return {"image": image, "label": self.labels[index]}

    def column(self, name: str) -> np.ndarray:
        return self.labels if name == "label" else super().column(name)

    def where(self, index: int) -> str:
        return f"example {index} ({self.paths[index].relative_to(self.root)})"


def decode(path: str | Path, *, grey: bool = False, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as uint8 `(height, width, channels)`, 1 channel if `grey`, else 3; resized to `size`, if given.

    Grey values of 16 bits become the nearest of 8.

    Raises:
        DataError: the file is missing, is no image, is larger than Pillow takes for safe, or holds numbers of 32 bits,
            of which nothing says what is white.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = "L" if grey else "RGB"
            image.load()
            pixels = image if image.mode == mode else _of_8_bits(image, path).convert(mode)
            if size is not None and pixels.size != (size[1], size[0]):
                pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            array = np.asarray(pixels)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return array[..., None] if grey else array


def _of_8_bits(image: Any, path: str | Path) -> Any:
    """The image, with 8 bits where it was grey with more: Pillow's conversion would take all above 255 for white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PGM, scaled to 16 bits
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise DataError(f"{path} holds {kind} of 32 bits, and nothing says which is white; save it with 8 or 16 bits")
    return image


def _unreadable(path: str | Path, error: Exception) -> DataError:
    """What Pillow said, with the path."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no file {path}")
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    if type(error).__name__ == "DecompressionBombError":
        return DataError(f"{path} is too large: {cause} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS")
    return DataError(f"{path} is not an image that can be read: {cause}")


def _homes(root: Path, split: str | None, classes: Sequence[str] | None) -> tuple[Path, list[Path]]:
    """The folder in which each folder is a class, and those of all splits, of which it is one."""
    folders = _folders(root)
    splits = [d for d in folders if d.name in SPLITS]
    others = [d.name for d in folders if d.name not in SPLITS and _has_images(d)]
    if others:  # beside them "valid" is a split where it has classes in it, and else a class itself
        splits = [d for d in splits if _classes(d)]
    if classes is not None and {*others, *(d.name for d in splits)} <= set(classes):
        splits = []  # "train" may be a kind of vehicle
    if splits and not others:
        wanted = root / (split or "train")
        if wanted not in splits:
            raise DataError(f"{root} has no split {wanted.name!r}; it has {', '.join(d.name for d in splits)}")
        return wanted, splits
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


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _classes(home: Path) -> list[str]:
    return [d.name for d in _folders(home) if _has_images(d)]


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, folder.rglob("*")))


def _images(folder: Path) -> list[Path]:
    return sorted(filter(_is_image, folder.rglob("*"))) if folder.is_dir() else []


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _is_grey(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
    except (OSError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _common_size(paths: list[Path]) -> tuple[int | None, int | None]:
    """The size of all images, by their headers, or None where they differ. (A header takes about 50 us.)"""
    from PIL import Image

    sizes = set()
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.add((image.height, image.width))
        except (OSError, Image.DecompressionBombError):
            continue  # the error comes with the path when the image is read
        if len(sizes) > 1:
            return (None, None)
    return sizes.pop() if sizes else (None, None)
