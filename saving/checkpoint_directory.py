"""The directory of a run's checkpoints: which there are, where each one lies, what is put aside and what is removed.

A checkpoint of step 120 is the folder `00000120`. One that is written anew lies aside meanwhile, as
`00000120.replaced`, and counts until the new one is there. What is to be removed is renamed first, to
`00000120.removed-0`, so that no half of it is ever trusted.
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
    """The checkpoints in ``path``, which need not exist yet. One process alone may change what is there.

    >>> Directory(Path("no/such/directory")).steps()
    []
    """

    def __init__(self, path: Path):
        self.path = path
        self._told: set[str] = set()

    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending. CheckpointError where the directory cannot be listed."""
        try:
            names = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"the checkpoints in {self.path} cannot be listed: {error.strerror}") from error
        return sorted({int(match[1]) for match in map(_STEP.fullmatch, names) if match})

    def own(self, step: int) -> Path:
        """Where checkpoint ``step`` belongs.

        >>> Directory(Path("run")).own(120).name
        '00000120'
        """
        return self.path / f"{step:08d}"

    def place(self, step: int) -> Path:
        """Where checkpoint ``step`` is: aside, where the one that replaces it is not written yet."""
        own, aside = self.own(step), self._aside(step)
        return aside if aside.exists() and not own.exists() else own

    def check_name(self) -> None:
        r"""ConfigError for a path that Orbax would take for a pattern, and leave out the file that says where all is,
        for one that is no UTF-8, which its files cannot name, and for a bucket, which would be a folder called "gs:".

        >>> Directory(Path("runs/a[1]")).check_name()
        Traceback (most recent call last):
        sapwood.core.errors.ConfigError: checkpoints cannot be written to runs/a[1]: rename what has a * ? [ ] \ in it
        """
        if _ADDRESS.match(str(self.path)):  # `Path` makes one slash of two
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
        """Create the directory, clear what a killed run left half-written, move the checkpoint of ``step`` aside."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._sweep()
        if self.own(step).exists():
            self.own(step).rename(self._aside(step))

    def put_back(self) -> None:
        """Give what was moved aside its name again where nothing was written under it."""
        for step in self.steps():
            if not self.own(step).exists():
                self._aside(step).rename(self.own(step))

    def keep_only(self, choose: Callable[[list[int]], set[int | None]]) -> None:
        """Remove the checkpoints whose steps are not chosen, and what was replaced. What cannot be removed stays, with
        a warning."""
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
        """Remove what was replaced or given up, and what a write that did not end has left."""
        self.put_back()
        for path in [self.path / name for name in os.listdir(self.path)]:
            if path.suffix == _ASIDE or _REMOVED in path.name or _UNFINISHED in path.name:
                with self._lets_stay(path.stem):
                    shutil.rmtree(path if _REMOVED in path.name else path.rename(_removed(path)))

    @contextlib.contextmanager
    def _lets_stay(self, what: str) -> Iterator[None]:
        """Go on where something cannot be removed, and say so once."""
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
    """A name for what is to be removed that nothing has, should the one before it still be there."""
    names = (path.with_name(f"{path.name.partition('.')[0]}{_REMOVED}-{i}") for i in itertools.count())
    return next(name for name in names if not name.exists())
