"""The image decoder of all sources: any image that Pillow reads, as a viewer shows it, in 8 bits, gray or RGB.

`decode` returns the pixels; `survey` finds the common size and channels from the headers. Most private functions
correct cases in which Pillow's own conversion is not what a viewer shows: 16 bits, transparency, EXIF orientation.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.file_checks import check_regular_file

GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes without color."""
ORIENTATION = 0x0112  # the EXIF tag
TAIL = 1 << 17  # bytes at the end of a PNG that are searched for an orientation
TURNED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keys under which Pillow finds the orientation of a PNG."""


def decode(
    picture: Any, *, grey: bool = False, size: tuple[int, int] | None = None, name: str | None = None
) -> np.ndarray:
    """Decode an image as a viewer shows it: uint8 `(height, width, channels)`, 1 channel if `grey`, else 3.

    The image is rotated by its EXIF orientation. Transparent pixels are drawn on white. Gray values of 16 bits are
    rounded to 8 bits. Palettes, CMYK, YCbCr, HSV and LAB become RGB by Pillow's formulas; color profiles are not
    applied. Of an animation or several pages, only the first image is decoded.

    Args:
        picture: a path, the bytes of a file, a dict of "bytes" and "path" as Hugging Face stores them, or a Pillow
            image.
        grey: whether to return one channel, by the luma of ITU-R BT.601.
        size: (height, width) to resize to, bilinear; None keeps the size.
        name: the name in error messages; default the path.

    Raises:
        DataError: the file is missing, damaged or no image, is larger than Pillow considers safe, or has 32-bit
            numbers, whose white is unknown.

    Example:
        >>> from PIL import Image
        >>> decode(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).tolist()  # a red that nobody sees
        [[[255, 255, 255]]]
    """
    from PIL import Image

    with _opened(picture, name) as (image, called):
        _scale_key(image, called)
        image.load()
        pixels = _seen(_upright(image), called)
        if grey:
            pixels = pixels.convert("L")
        elif pixels.mode != "RGB":
            pixels = pixels.convert("RGB")
        if size is not None and pixels.size != (size[1], size[0]):
            _check_size((size[1], size[0]), f"the size for {called}")
            pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        array = np.array(pixels)
    return array[..., None] if grey else array


def survey(
    pictures: Iterable[Any], where: Callable[[int], str], *, sizes: bool = True
) -> tuple[int | None, int | None, int]:
    """The common height and width of images, None if they differ, and the channels: 1 if all are gray, else 3.

    It reads only the headers, about 50 us each, and stops when the answer is known. An image that cannot be read is
    skipped; its error is raised when it is decoded, or here if no image can be read.

    Args:
        pictures: the images, each as `decode` takes it.
        where: a function from an index to the name of the image in error messages.
        sizes: whether to find the height and width; they are None otherwise.
    """
    found: set[Any] = set()
    failed, grey = None, True
    for index, picture in enumerate(pictures):
        try:
            with _opened(picture, where(index)) as (image, _):
                grey = grey and image.mode in GREY
                found.add(_size(image) if sizes else None)
        except DataError as error:
            failed = failed or error
        if not grey and (len(found) > 1 or not sizes):
            break
    if failed and not found:
        raise failed
    height, width = (found.pop() if len(found) == 1 else None) or (None, None)
    return height, width, 1 if grey else 3


def is_picture(value: Any) -> bool:
    """Whether `value` is a Pillow image. This does not import Pillow."""
    return hasattr(value, "getbands") and hasattr(value, "mode")


def pixels(value: Any) -> Any:
    """The pixels of a Pillow image, any other value unchanged. (NumPy would read a palette's indices as pixels.)"""
    return decode(value, grey=value.mode in GREY) if is_picture(value) else value


def class_numbers(picture: Any, name: str) -> np.ndarray:
    """The numbers `(height, width)` of a Pillow image that is a label, such as a segmentation mask.

    For an image with a palette these are the palette's indices.

    Raises:
        DataError: the image has several numbers per pixel.
    """
    if picture.mode not in ("1", "L", "P", "I", "I;16"):
        raise DataError(f"{name} is a picture in mode {picture.mode}; a label has one number a pixel: mode L, P or I")
    return np.array(picture)


@contextmanager
def _opened(picture: Any, name: str | None) -> Iterator[tuple[Any, str]]:
    """Open anything that `decode` takes as a Pillow image, and give it with its name for error messages.

    Exceptions of any type inside the block, which Pillow's parsers raise on damaged files, become `DataError`.
    """
    from PIL import Image

    if hasattr(picture, "as_py"):  # a cell of a pyarrow table
        picture = picture.as_py()
    if isinstance(picture, dict):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    called = name or (str(picture) if isinstance(picture, str | Path) else "the picture")
    if picture is None:
        raise DataError(f"{called} has no picture")
    try:
        if is_picture(picture):
            yield picture, called
            return
        if isinstance(picture, str | Path):
            check_regular_file(picture, called)
        with Image.open(
            io.BytesIO(picture) if isinstance(picture, bytes | bytearray | memoryview) else picture
        ) as image:
            if image.format == "EPS":
                raise DataError(f"{called} is PostScript, which is a program and is not run; save it as PNG")
            _check_size(image.size, called)
            yield image, called
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(called, error) from error


def _check_size(size: tuple[int, int], called: str) -> None:
    """Raise `DataError` for more pixels than Pillow considers safe. Pillow itself only warns up to twice as many."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise DataError(
            f"{called} is too large: {size[0]:,} x {size[1]:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}. Make "
            "it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )


def _unreadable(called: str, error: Exception) -> DataError:
    """The `DataError` for an exception of Pillow's, with the image's name."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no file {called}")
    cause = str(error).splitlines()[0].split(" <_io.")[0] if str(error) else type(error).__name__
    if type(error).__name__ == "DecompressionBombError":
        return DataError(f"{called} is too large: {cause} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS")
    return DataError(f"{called} is not an image that can be read: {cause}")


def _upright(image: Any) -> Any:
    """The image rotated by its EXIF orientation."""
    from PIL import ImageOps

    return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def _size(image: Any) -> tuple[int, int]:
    """Height and width after rotation by the EXIF orientation. Pillow reports a TIFF as rotated already."""
    from PIL import Image

    if image.format == "TIFF":
        return image.height, image.width
    header = image.format == "PNG" and not _turned_behind(image.fp)  # PNG's own getexif decodes the whole image
    exif = Image.Image.getexif(image) if header else image.getexif()
    turned = exif.get(ORIENTATION, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _turned_behind(file: Any) -> bool:
    """Whether a PNG may have its orientation after its pixels, judged by its last `TAIL` bytes.

    Pillow would decode the whole image to find out. True if the file is None: Pillow has decoded it already then.
    """
    if file is None:
        return True
    at = file.tell()
    file.seek(max(0, file.seek(0, io.SEEK_END) - TAIL))
    end = file.read()
    file.seek(at)
    return any(key in end for key in TURNED)


def _scale_key(image: Any, called: str) -> None:
    """Scale the value that means "transparent" in a PNG to 8 bits, as Pillow scales its pixels but not this value.

    Raises:
        DataError: the image is loaded already, so it no longer says how many bits the file had, and the result depends
            on that.
    """
    key = image.info.get("transparency") if image.format == "PNG" and not image.tile else None
    if image.mode == "L" and isinstance(key, int) and 0 < key < 16 and not np.any(np.asarray(image) % 17):
        raise DataError(
            f"{called} is a PNG that is loaded already, and does not say any more whether its transparent grey {key} "
            "is of 2, 4 or 8 bits; give its path or its bytes"
        )
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    depth = image.tile[0].args if image.format == "PNG" and "transparency" in image.info and image.tile else None
    if depth in ("L;2", "L;4"):
        image.info["transparency"] *= 85 if depth == "L;2" else 17
    elif depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])


def _seen(image: Any, called: str) -> Any:
    """Convert an image to mode L or RGB as a viewer shows it: transparency on white, 16 bits scaled to 8.

    Raises `DataError` for 32-bit numbers.
    """
    from PIL import Image

    key = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PGM, scaled to 16 bits
        return Image.fromarray(_of_16_bits(image, key))
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "floats"
        raise DataError(f"{called} holds {kind} of 32 bits, and nothing says which is white; save it with 8 or 16 bits")
    mode = "L" if image.mode in GREY else "RGB"
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    layer = image.convert("RGBA")
    seen = Image.new("RGB", image.size, "white")
    seen.paste(layer, mask=layer.getchannel("A"))
    return seen.convert(mode)


def _of_16_bits(image: Any, key: int | None) -> np.ndarray:
    """Scale 16-bit gray to 8 bits, rounded, uint8 `(height, width)`. Pillow's conversion clips all above 255 to white.

    Pillow neither scales 12-bit values of a TIFF nor inverts a TIFF whose 0 is white; both are done here. A pixel equal
    to `key`, the transparent value, becomes white.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(258) == (12,) else 65535
    seen = np.rint(values * (255 / white)).astype(np.uint8)
    if tags.get(262) == 0:
        seen = 255 - seen
    return seen if key is None else np.where(values == key, np.uint8(255), seen)
