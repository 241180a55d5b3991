"""Checks of a file before it is read: it is a regular file, and it does not unpack to far more memory than its size."""

import os
import stat
from pathlib import Path

from sapwood.core.errors import DataError

ROOM = 256 << 20
"""Bytes that a file of any size may unpack to."""
RATIO = 300
"""A file that unpacks to more than `ROOM` may unpack to this many times its size. Measured data packs by 2 to 20."""


def check_regular_file(path: str | Path, called: str | None = None) -> None:
    """Raise `DataError` unless `path` is a regular file. Reading a pipe, for example, would wait forever.

    Raises `FileNotFoundError` if nothing is there. `called` is the name in the message, by default the path.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{called or path} is no file")


def check_unpacked(path: Path, size: int, instead: str) -> None:
    """Raise `DataError` if a file would unpack to `size` bytes, above `ROOM` and above `RATIO` times its own size.

    `instead` is the code that the message suggests for a file that is meant to be so.
    """
    there = path.stat().st_size
    if size > ROOM and size > RATIO * there:
        raise DataError(
            f"{path} has {there:,} bytes and would unpack to {size:,}, which looks like an attack on memory; if it is "
            f"meant so, read it yourself: {instead}"
        )
