"""Consent: records which recipe files the user has run on purpose.

A command that reads a run directory may run the recipe file of that run again, if consent to the file is recorded. A
run directory may come from a stranger. The stranger then wrote everything in the directory: the path of the recipe, the
digest of the recipe, and the recipe itself. So consent is not stored in the run directory, but in the user's state
directory: one empty file for each version of each recipe file that the user has named (`sapwood train my_recipe.py`,
`sapwood evaluate RUN --trust my_recipe.py`). An edited file is a new version and needs consent again.
"""

import contextlib
import hashlib
import os
from pathlib import Path


def remember(file: Path, source: bytes) -> None:
    """Record consent to a file with this content. If the record cannot be written, consent is asked for again later."""
    with contextlib.suppress(OSError, RuntimeError):  # no home directory, or a full or read-only one
        place = _place(file, source)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.touch()


def given(file: Path, source: bytes) -> bool:
    """Whether consent to this file with this content is recorded."""
    with contextlib.suppress(OSError, RuntimeError):
        return _place(file, source).exists()
    return False


def _place(file: Path, source: bytes) -> Path:
    """The path of the record for a file. Its name is a digest of the file's path and content."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = hashlib.sha256(os.fsencode(file.resolve()) + b"\0" + source).hexdigest()
    return home / "sapwood" / "recipes" / name
