"""Consent: which recipe files this user has run on purpose, so that commands that read a run may run them again.

A run directory may come from a stranger, and so may everything in it: the path of its recipe, a digest of that, the
recipe itself. So consent is kept outside of it, in the user's own directory: one empty file for each version of each
recipe file that the user has named (`sapwood train my_recipe.py`, `sapwood evaluate RUN --trust my_recipe.py`). A file
that was edited since is another version, and asks again.
"""

import contextlib
import hashlib
import os
from pathlib import Path


def remember(file: Path, source: bytes) -> None:
    """Keep that the user has named this file with this content. Where nothing can be written, it is asked for again."""
    with contextlib.suppress(OSError, RuntimeError):  # no home directory, or a full or read-only one
        place = _place(file, source)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.touch()


def given(file: Path, source: bytes) -> bool:
    """Whether the user has named this file with this content before."""
    with contextlib.suppress(OSError, RuntimeError):
        return _place(file, source).exists()
    return False


def _place(file: Path, source: bytes) -> Path:
    """Where the consent to a file is kept: under a digest of its path and its content."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = hashlib.sha256(os.fsencode(file.resolve()) + b"\0" + source).hexdigest()
    return home / "sapwood" / "recipes" / name
