"""Files as they should be before anything reads them: no pipe or device, and nothing that unpacks to a flood."""

import os
import stat
from pathlib import Path

from sapwood.core.errors import DataError

ROOM = 256 << 20
"""Bytes that any file may unpack to."""
RATIO = 300
"""How many times its own size a file may unpack to beyond that; numbers that were measured pack by 2 to 20."""


def check_ordinary(path: str | Path, called: str | None = None) -> None:
    """DataError where there is something at `path` that is no file, such as a pipe, which would be waited for.

    Raises FileNotFoundError where there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{called or path} is no file")


def check_unpacked(path: Path, size: int, instead: str) -> None:
    """DataError where a file would take `size` bytes of memory, far beyond its own size; `instead` says what to write
    where that is meant."""
    there = path.stat().st_size
    if size > ROOM and size > RATIO * there:
        raise DataError(
            f"{path} has {there:,} bytes and would unpack to {size:,}, which looks like an attack on memory; if it is "
            f"meant so, read it yourself: {instead}"
        )
