"""A folder of images, one folder a class inside it, read when they are asked for."""

from pathlib import Path

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.features import Feature
from sapwood.data.source import Source
from sapwood.data.sources.labels import Classes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "validation", "val", "test")


class Folder(Source):
    """Images by class: `root/cat/1.png` has label "cat"; or `root/train/cat/1.png` with split "train".

    Images are "image", uint8 `(height, width, channels)`, with 1 channel where the first image is grey and 3
    otherwise, and resized to `size` (bilinear) where that is given. Classes are the folders' names in order.
    """

    def __init__(self, root: Path, split: str | None, classes: Classes, size: tuple[int, int] | None):
        home = _split(root, split)
        names = [d.name for d in _folders(home) if _images(d)]
        if isinstance(classes, int):
            raise ConfigError(
                "the classes of a folder are the names of its folders; classes= takes names to order them"
            )
        if classes is not None:
            unknown = [n for n in names if n not in classes]
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

    Raises:
        DataError: the file is missing or is not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            mode = "L" if grey else "RGB"
            image.load()
            pixels = image if image.mode == mode else image.convert(mode)
            if size is not None and pixels.size != (size[1], size[0]):
                pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            array = np.asarray(pixels)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not an image that can be read: {str(error).splitlines()[0]}") from error
    return array[..., None] if grey else array


def _split(root: Path, split: str | None) -> Path:
    folders = [d.name for d in _folders(root)]
    has_splits = bool(folders) and all(name in SPLITS for name in folders)
    if has_splits:
        wanted = split or "train"
        if wanted not in folders:
            raise DataError(f"{root} has no split {wanted!r}; it has {', '.join(folders)}")
        return root / wanted
    if split is not None:
        raise DataError(f"{root} has no split {split!r}; its folders are classes: {', '.join(folders[:10])}")
    return root


def _folders(root: Path) -> list[Path]:
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _is_grey(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L", "I", "I;16", "F")
    except OSError as error:
        raise DataError(f"{path} is not an image that can be read: {error}") from error


def _common_size(paths: list[Path]) -> tuple[int | None, int | None]:
    """The size of all images, by their headers, or None where they differ. (A header takes about 50 us.)"""
    from PIL import Image

    sizes = set()
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.add((image.height, image.width))
        except OSError:
            continue  # the error comes with the path when the image is read
        if len(sizes) > 1:
            return (None, None)
    return sizes.pop() if sizes else (None, None)
