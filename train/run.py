"""The directory of a run: its rows, its TensorBoard events and its checkpoints; nothing at all where none is wanted."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.train import sealed
from sapwood.train.checkpoint_directory import Directory
from sapwood.train.checkpoints import Checkpoints, Info
from sapwood.train.continuing import ANYWAY
from sapwood.train.logs import JsonlLog, TensorBoardLog, read_rows
from sapwood.train.orbax_arrays import preload
from sapwood.train.restored import restored


class Run:
    """What `fit` writes to ``directory`` (None writes nothing). A context manager: leaving waits for what is under way.

    Raises `ConfigError` for options that need a directory where there is none, `CheckpointError` where the directory
    holds the checkpoints of another run and ``resume`` does not say to go on from them.
    """

    def __init__(self, directory: Any, *, resume: bool | str, keep: int, best: str | None):
        if resume not in (True, False, ANYWAY):
            raise ConfigError(f'fit(resume={resume!r}): True, False or "anyway" is expected')
        if directory is None and resume:
            raise ConfigError(f"fit(resume={resume!r}) needs run=, the directory that holds the checkpoints")
        self.directory = None if directory is None else Path(directory).expanduser()
        self.checkpoints: Checkpoints | None = None
        self.newest: int | None = None
        self.logs: list[Any] = []
        self.notes: dict[str, Any] = {}
        if self.directory is None:
            return
        Directory(self.directory).check_name()
        self.checkpoints = Checkpoints(self.directory / "checkpoints", keep=keep, best=best)
        self.newest = max(self.checkpoints.candidates(), default=None)  # all processes start afresh, or none does
        if self.newest is not None and not resume:
            raise CheckpointError(
                f"{directory} already holds a run (newest checkpoint: step {self.newest}); resume it "
                f"(resume=True, --resume), or choose another directory"
            )
        preload()  # Orbax takes 0.4 s to import: in a thread, while the step compiles

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for log in self.logs:
            log.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """The state and info of the newest whole checkpoint, or None where there is none yet."""
        if self.checkpoints is None or self.newest is None:
            return None
        state, found = restored(self.checkpoints, shapes)
        return state, found.info

    @staticmethod
    def saved(directory: Any) -> Info | None:
        """What the newest checkpoint that can be read says of itself; None where there is none."""
        checkpoints = Checkpoints(Path(directory or ".").expanduser() / "checkpoints")
        for step in reversed([] if directory is None else checkpoints.steps()):
            with contextlib.suppress(CheckpointError):  # damaged, which `restore` says
                return checkpoints.info(step)
        return None

    def best(self, shapes: Any, last: Any) -> Any:
        """The state of the best checkpoint; the last state where that is the best, or no checkpoint has a number."""
        assert self.checkpoints is not None
        self.checkpoints.wait()
        step = self.checkpoints.best()
        return last if step in (None, int(jax.device_get(last.step))) else restored(self.checkpoints, shapes, step)[0]

    def save(self, step: int, state: Any, info: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Start to write a checkpoint."""
        assert self.checkpoints is not None
        numbers = {name: x for name, x in metrics.items() if isinstance(x, int | float)}
        self.checkpoints.save(step, state, info, numbers)

    def noted(self, name: str) -> Any:
        """What `note` wrote under a name, None where it did not."""
        return (self._config() or {}).get(name)

    def note(self, name: str, value: Any) -> None:
        """Write what the run has found out about itself into its ``config.json``, where it has one and it is news."""
        if value is None or self.notes.get(name) == value or jax.process_index() > 0:
            return
        self.notes[name] = value
        config = self._config()
        if config is None or self.directory is None or config.get(name) == value:
            return
        with self._writable():
            sealed.write(self.directory / "config.json", {**config, name: value})

    def _config(self) -> dict[str, Any] | None:
        try:
            return None if self.directory is None else sealed.read(self.directory / "config.json", unsealed=True)
        except (OSError, ValueError):
            return None

    def begin(self, step: int | None) -> list[dict[str, Any]]:
        """Open the logs of a fresh run (None), or of one that goes on from a step; returns the rows so far."""
        if self.directory is None or jax.process_index() > 0:
            return []
        rows, events = self.directory / "metrics.jsonl", self.directory / "tensorboard"
        killed = step is None and any(events.glob("events.*"))  # before its first checkpoint: all of it is taken back
        with self._writable():
            self.logs.append(JsonlLog(rows, after=step))
            self.logs.append(TensorBoardLog(events, after=0 if killed else step))
        return [] if step is None else [{name: _number(x) for name, x in row.items()} for row in read_rows(rows)]

    def write(self, row: dict[str, Any]) -> None:
        """Write one row to the logs; TensorBoard takes single numbers alone."""
        if not self.logs:
            return
        with self._writable():
            self.logs[0].write({name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in row.items()})
            self.logs[1].write({name: x for name, x in row.items() if isinstance(x, int | float)})

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the run directory {self.directory} cannot be written: {error.strerror}; make room "
                                  f"and resume, or choose another directory") from error  # fmt: skip


def _number(x: Any) -> Any:
    """A value as it was before it was written: JSON has no NaN and no infinity, so they are strings there."""
    if isinstance(x, list):
        array = np.asarray(x)
        return array.astype(float) if array.dtype.kind == "U" else array
    return float(x) if isinstance(x, str) else x
