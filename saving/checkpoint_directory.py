"""The directory of a run's checkpoints: lists, locates, sets aside and removes them.

The checkpoint of step 120 is the folder `00000120`. When step 120 is saved again, the old folder is renamed to
`00000120.replaced` and remains valid until the new one is complete. A folder to be removed is first renamed to
`00000120.removed-0`, so a partly removed checkpoint is never read.
"""

import contextlib
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.messages import short

_ASIDE = ".replaced"
_REMOVED = ".removed"
_UNFINISHED = ".orbax-checkpoint-tmp"
_PATTERN = ["*", "?", "[", "]", *("\\" if os.sep == "/" else "")]
_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/")
_STEP = re.compile(rf"(\d{{8,}})({_ASIDE})?")


class Directory:
    """The checkpoints in ``path``, a directory that need not exist yet. Only one process may change its contents.

    >>> Directory(Path("no/such/directory")).steps()
    []
    """

    def __init__(self, path: Path):
        self.path = path
        self._told: set[str] = set()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending. Raises CheckpointError if the directory cannot be listed."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"the checkpoints in {self.path} cannot be listed: {error.strerror}") from error
        return sorted({int(match[1]) for match in map(_STEP.fullmatch, names) if match})

    def own(self, step: int) -> Path:
        """The regular folder of checkpoint ``step``, whether it exists or not.

        >>> Directory(Path("run")).own(120).name
        '00000120'
        """
        return self.path / f"{step:08d}"

    def place(self, step: int) -> Path:
        """The folder to read checkpoint ``step`` from.

        It is `own(step)`, unless only the set-aside folder exists because the replacement is not complete yet.
        """
        own, aside = self.own(step), self._aside(step)
        return aside if aside.exists() and not own.exists() else own

    def check_name(self) -> None:
        r"""Raise ConfigError for a path that cannot hold checkpoints.

        - A path with a wildcard: Orbax takes it for a glob pattern and omits the file that locates the arrays.
        - A path that is not UTF-8: Orbax's files cannot name it.
        - A bucket address such as `gs://bucket`: it would become a local folder called "gs:".

        >>> Directory(Path("runs/a[1]")).check_name()
        Traceback (most recent call last):
        sapwood.core.errors.ConfigError: checkpoints cannot be written to runs/a[1]: rename what has a * ? [ ] \ in it
        """
        if _ADDRESS.match(str(self.path)):  # `Path` turns two slashes into one
            raise ConfigError(
                f"checkpoints go to a directory, not to {self.path}; mount the bucket (gcsfuse) and name the mount"
            )
        name = str(self.path.absolute())
        if any(letter in name for letter in _PATTERN):
            signs = " ".join(_PATTERN)
            raise ConfigError(f"checkpoints cannot be written to {self.path}: rename what has a {signs} in it")
        try:
            name.encode()
        except UnicodeEncodeError:
            said = os.fsencode(self.path).decode(errors="replace")
            raise ConfigError(f"checkpoints cannot be written to {said}: rename what is no UTF-8 in it") from None

    def make_room(self, step: int) -> None:
        """Prepare for writing checkpoint ``step``.

        Creates the directory, removes what a killed run left unfinished, and sets an old checkpoint ``step`` aside.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._sweep()
        if self.own(step).exists():
            self.own(step).rename(self._aside(step))

    def put_back(self) -> None:
        """Rename each set-aside checkpoint back to its regular folder, unless a new checkpoint is there."""
        for step in self.steps():
            if not self.own(step).exists():
                self._aside(step).rename(self.own(step))

    def keep_only(self, choose: Callable[[list[int]], set[int]]) -> None:
        """Remove all checkpoints except the chosen ones, and all replaced ones.

        ``choose`` maps the list of steps to the set of steps to keep. A folder that cannot be removed stays, with a
        warning.
        """
        with self._lets_stay("what is no longer needed"):
            steps = self.steps()
            kept = choose(steps)
            for path in [self.own(step) for step in steps if step not in kept]:
                with self._lets_stay(path.name):
                    path.rename(_removed(path))
            self._sweep()

    def _aside(self, step: int) -> Path:
        return self.path / f"{step:08d}{_ASIDE}"

    def _sweep(self) -> None:
        """Remove replaced checkpoints, folders marked as removed, and the remains of interrupted writes."""
        self.put_back()
        for path in [self.path / name for name in os.listdir(self.path)]:
            if path.suffix == _ASIDE or _REMOVED in path.name or _UNFINISHED in path.name:
                with self._lets_stay(path.stem):
                    shutil.rmtree(path if _REMOVED in path.name else path.rename(_removed(path)))

    @contextlib.contextmanager
    def _lets_stay(self, what: str) -> Iterator[None]:
        """Turn a failed removal of ``what`` into a warning, given once per ``what``."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            if what not in self._told:
                self._told.add(what)
                warnings.warn(
                    f"{what} could not be removed from {self.path}: {short(error)}; what is left of it stays there, "
                    "and each save tries again",
                    stacklevel=2,
                )


def _removed(path: Path) -> Path:
    """An unused name for a folder to be removed: `00000120.removed-0`, or the next free number."""
    names = (path.with_name(f"{path.name.partition('.')[0]}{_REMOVED}-{i}") for i in itertools.count())
    return next(name for name in names if not name.exists())
