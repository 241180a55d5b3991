"""JSON that shows when it was changed: an object beside the checksum of its canonical text, and who wrote it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sapwood.core.version import __version__

MOST = 16 << 20
"""Bytes of a file that `read` takes: what JSON makes of it takes twenty times as much memory."""


def seal(content: dict[str, Any]) -> str:
    """The text to write. Raises TypeError or ValueError where `content` is nothing that JSON holds.

    >>> unseal(seal({"step": 3}))
    {'step': 3}
    """
    content = json.loads(json.dumps(content))  # as it will be read: keys are text, and 10 sorts before 2
    return json.dumps({"sapwood": __version__, "sha256": _checksum(content), "content": content}, indent=1)


def unseal(text: str | bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError where the text is not what `seal` wrote.

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
    """The content of a sealed file; with `unsealed`, of one from before such files were sealed, too.

    Raises OSError where it cannot be read, FileNotFoundError where it is not there; ValueError where it is no file,
    larger than `MOST`, or not what was written.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # a pipe would be waited for
    if (size := path.stat().st_size) > MOST:
        raise ValueError(f"it has {size:,} bytes, and {MOST:,} is the most that is read")
    said = _parsed(path.read_bytes())
    if unsealed and isinstance(said, dict) and "sha256" not in said:
        return said
    return _opened(said)


def write(path: Path, content: dict[str, Any]) -> None:
    """Seal `content` into a file, whole or not at all, also when killed. Raises OSError where it cannot be written."""
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
