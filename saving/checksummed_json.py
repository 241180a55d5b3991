"""JSON files with a checksum: reading one fails if its content was changed.

A file holds `content` (a JSON object), `sha256` (the checksum of its canonical text) and `sapwood` (the version that
wrote it).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sapwood.core.version import __version__

MOST = 16 << 20
"""The largest file that `read` accepts, in bytes. Parsed JSON takes twenty times as much memory."""


def seal(content: dict[str, Any]) -> str:
    """The text of a file that holds `content`. Raises TypeError or ValueError if JSON cannot hold `content`.

    >>> unseal(seal({"step": 3}))
    {'step': 3}
    """
    content = json.loads(json.dumps(content))  # as it is read back: keys are strings, so "10" sorts before "2"
    return json.dumps({"sapwood": __version__, "sha256": _checksum(content), "content": content}, indent=1)


def unseal(text: str | bytes) -> dict[str, Any]:
    """The content of a text that `seal` made. Raises ValueError if the text was changed or `seal` did not make it.

    >>> unseal(seal({"step": 3}).replace("3", "4"))
    Traceback (most recent call last):
    ValueError: it reads back other than it was written
    """
    return _opened(_parsed(text))


def _opened(said: Any) -> dict[str, Any]:
    if not isinstance(said, dict) or said.get("sha256") != _checksum(said.get("content")):
        raise ValueError("it reads back other than it was written")
    if not isinstance(said["content"], dict):
        raise ValueError("it was not written by Sapwood")
    return said["content"]


def read(path: Path, *, unsealed: bool = False) -> dict[str, Any]:
    """The content of a sealed file. With `unsealed=True` also of a file without checksum, as early versions wrote.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if it does not exist.
        ValueError: it is not a regular file, is larger than `MOST` bytes, or was changed.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # reading a pipe would block
    if (size := path.stat().st_size) > MOST:
        raise ValueError(f"it has {size:,} bytes, and {MOST:,} is the most that is read")
    said = _parsed(path.read_bytes())
    if unsealed and isinstance(said, dict) and "sha256" not in said:
        return said
    return _opened(said)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as a sealed file, atomically: a killed process leaves the old file or the new one.

    Raises OSError if the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    part.write_text(seal(content) + "\n")
    os.replace(part, path)


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its parts lie in each other without end") from None


def _checksum(content: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("its parts lie in each other without end") from None
