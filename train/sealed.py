"""JSON that shows when it was changed: an object beside the checksum of its canonical text, and who wrote it."""

import hashlib
import json
import sys
from typing import Any


def seal(content: dict[str, Any]) -> str:
    """The text to write. Raises TypeError or ValueError where `content` is nothing that JSON holds.

    >>> unseal(seal({"step": 3}))
    {'step': 3}
    """
    version = sys.modules["sapwood"].__version__  # importing this module has imported the package
    content = json.loads(json.dumps(content))  # as it will be read: keys are text, and 10 sorts before 2
    return json.dumps({"sapwood": version, "sha256": _checksum(content), "content": content}, indent=1)


def unseal(text: str | bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError where the text is not what `seal` wrote.

    >>> unseal(seal({"step": 3}).replace("3", "4"))
    Traceback (most recent call last):
    ValueError: it reads back other than it was written
    """
    sealed = json.loads(text)
    if not isinstance(sealed, dict) or sealed.get("sha256") != _checksum(sealed.get("content")):
        raise ValueError("it reads back other than it was written")
    return sealed["content"]


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
