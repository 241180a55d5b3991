"""The directory of a run: its rows, its TensorBoard events and its checkpoints; nothing at all where none is wanted."""

import contextlib
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sapwood.core.errors import CheckError, CheckpointError, ConfigError
from sapwood.core.messages import some
from sapwood.runtime.processes import by_the_first, together
from sapwood.saving import checksummed_json
from sapwood.saving.checkpoints import Checkpoints, Info
from sapwood.saving.orbax_arrays import preload
from sapwood.train.record.jsonl import JsonlLog, read_rows
from sapwood.train.record.run_identity import ANYWAY
from sapwood.train.record.tensorboard import TensorBoardLog
from sapwood.train.record.writer_lock import Writer
from sapwood.train.state.finite import not_finite
from sapwood.train.state.restore import restored


class Run:
    """What `fit` writes to ``directory``, a path or a `Writer` (None writes nothing). A context manager: nobody else
    writes there meanwhile, and leaving waits for what is under way. ``id`` names the run: in its config, rows and
    checkpoints.

    Raises `ConfigError` for options that need a directory where there is none, and, on entering, `CheckpointError`
    where another process writes there, or the directory holds the checkpoints of another run and ``resume`` does not
    say to go on from them.
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
        self.id: str | None = None
        self.rows: str | None = None  # what the log of rows was when the checkpoint was saved; None in what 0.1 wrote
        self.save_nonfinite = False
        self.resume, self._held = resume, contextlib.ExitStack()
        if self.directory is None:
            return
        self.writer = directory if isinstance(directory, Writer) else Writer(self.directory)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", keep=keep, best=best)

    def __enter__(self) -> "Run":
        if self.checkpoints is None:
            return self
        with contextlib.ExitStack() as held:
            held.enter_context(self.writer)
            self.newest = max(self.checkpoints.candidates(), default=None)  # all processes start afresh, or none does
            if self.newest is not None and not self.resume:
                raise CheckpointError(
                    f"{self.directory} already holds a run (newest checkpoint: step {self.newest}); resume it "
                    f"(resume=True, --resume), or choose another directory"
                )
            self.id = by_the_first(lambda: self.noted("run") or new_id())
            held.enter_context(self.checkpoints)
            held.callback(lambda: [log.close() for log in self.logs])
            self._held = held.pop_all()
        preload()  # Orbax takes 0.4 s to import: in a thread, while the step compiles
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """The state and info of the newest whole checkpoint, or None where there is none yet."""
        if self.checkpoints is None or self.newest is None:
            return None
        state, found = restored(self.checkpoints, shapes)
        written = found.info.get("run")  # None in what 0.1 wrote
        if written is not None and self.noted("run") not in (None, written):
            raise CheckpointError(
                f"{self.directory} holds two runs: config.json is of {self.noted('run')}, checkpoint {found.step} of "
                f"{written}; move what is of another run away, or choose another directory"
            )
        self.id = written or self.id
        self.rows = found.info.get("rows")
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
        return last if step in (None, int(jax.device_get(last.step))) else restored(self.checkpoints, shapes, "best")[0]

    def wait(self) -> None:
        """Wait until what is being saved is written."""
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def save(self, step: int, state: Any, info: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Start to write a checkpoint. `CheckError` for a state that is not finite, unless `save_nonfinite`."""
        assert self.checkpoints is not None
        if not self.save_nonfinite and (bad := not_finite(state)):
            kept = f"checkpoint {self.newest} is the newest" if self.newest is not None else "there is no checkpoint"
            raise CheckError(
                f"after step {step} {some(bad)} {'is' if len(bad) == 1 else 'are'} not finite: nothing is saved over "
                f"what is in {self.directory}, where {kept}; a smaller learning rate or Trainer(clip=1.0) may help; "
                "fit(save_nonfinite=True), --save-nonfinite, saves such a state, too"
            )
        together(lambda: self.writer.check() if jax.process_index() == 0 else None)
        numbers = {name: x for name, x in metrics.items() if isinstance(x, int | float)}
        rows = self.logs[0].mark if self.logs else None
        self.checkpoints.save(step, state, {**info, "run": self.id, "rows": rows}, numbers)
        self.newest = step

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
            checksummed_json.write(self.directory / "config.json", {**config, name: value})

    def _config(self) -> dict[str, Any] | None:
        try:
            return (
                None if self.directory is None else checksummed_json.read(self.directory / "config.json", unsealed=True)
            )
        except (OSError, ValueError):
            return None

    def begin(self, step: int | None) -> list[dict[str, Any]]:
        """Open the logs of a fresh run (None), or of one that goes on from a step; returns the rows so far."""
        if self.directory is None or jax.process_index() > 0:
            return []
        self.note("run", self.id)
        rows, events = self.directory / "metrics.jsonl", self.directory / "tensorboard"
        killed = step is None and any(events.glob("events.*"))  # before its first checkpoint: all of it is taken back
        with self._writable():
            self.logs.append(JsonlLog(rows, after=step, run=self.id))
            self.logs.append(TensorBoardLog(events, after=0 if killed else step))
        if self.rows not in (None, self.logs[0].mark):
            warnings.warn(
                f"{rows} does not hold the rows that the run has written up to step {step}: they stay as they are, and "
                "the run goes on from its checkpoint, which is whole",
                stacklevel=2,
            )
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
        self.writer.check()
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the run directory {self.directory} cannot be written: {error.strerror}; make room "
                                  f"and resume, or choose another directory") from error  # fmt: skip


def new_id() -> str:
    """A name for a run that no other has.

    >>> len(new_id())
    12
    """
    return uuid.uuid4().hex[:12]


def _number(x: Any) -> Any:
    """A value as it was before it was written: JSON has no NaN and no infinity, so they are strings there."""
    if isinstance(x, list):
        array = np.asarray(x)
        return array.astype(float) if array.dtype.kind == "U" else array
    return float(x) if isinstance(x, str) else x
