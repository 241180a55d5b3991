"""`Run`: the directory of a run, with its lock, its metric logs, its ``config.json`` and its checkpoints.

`fit` uses one `Run`, also without a directory: then nothing is written. All processes call the same methods. Only the
first process writes the logs and ``config.json``; all processes write checkpoints. The first process also names the
run: its `id` is in the config, in each row and in each checkpoint, so files of two runs are told apart.
"""

import contextlib
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sapwood.core.errors import CheckError, CheckpointError, ConfigError
from sapwood.core.messages import first_names
from sapwood.runtime.processes import all_or_none, run_on_first_process
from sapwood.saving import checksummed_json
from sapwood.saving.checkpoints import Checkpoints, Info
from sapwood.saving.orbax_arrays import preload
from sapwood.train.record.jsonl import JsonlLog, read_rows
from sapwood.train.record.run_identity import ANYWAY
from sapwood.train.record.tensorboard import TensorBoardLog
from sapwood.train.record.writer_lock import DirectoryLock
from sapwood.train.state.finite import not_finite
from sapwood.train.state.restore import restore_state


class Run:
    """Everything that `fit` writes to a directory, as a context manager.

    Entering locks the directory. Leaving waits for pending writes and releases the lock.

    Args:
        directory: path of the run directory, or a `Writer` that holds it already; None writes nothing.
        resume: True continues from the checkpoints in the directory; "anyway" does so even if trainer or data changed.
        keep: number of newest checkpoints that stay.
        best: metric whose best checkpoint stays too, such as "max:accuracy"; None keeps none.

    Attributes:
        id: name of the run, a text; None before entering.
        newest: step of the newest checkpoint, or None.
        save_nonfinite: True also saves a state that is not finite.

    Raises:
        ConfigError: ``resume`` is invalid, or needs a directory.
        CheckpointError: on entering, if another process writes to the directory, or if it holds checkpoints of an
            earlier run and ``resume`` is False.
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
        self.rows: str | None = None  # `JsonlLog.mark` when the checkpoint was saved; None in files of 0.1
        self.save_nonfinite = False
        self.resume, self._held = resume, contextlib.ExitStack()
        if self.directory is None:
            return
        self.writer = directory if isinstance(directory, DirectoryLock) else DirectoryLock(self.directory)
        self.checkpoints = Checkpoints(self.directory / "checkpoints", keep=keep, best=best)

    def __enter__(self) -> "Run":
        if self.checkpoints is None:
            return self
        with contextlib.ExitStack() as held:
            held.enter_context(self.writer)
            self.newest = max(self.checkpoints.candidates(), default=None)  # the same on all processes
            if self.newest is not None and not self.resume:
                raise CheckpointError(
                    f"{self.directory} already holds a run (newest checkpoint: step {self.newest}); resume it "
                    f"(resume=True, --resume), or choose another directory"
                )
            self.id = run_on_first_process(lambda: self.noted("run") or new_id())
            held.enter_context(self.checkpoints)
            held.callback(lambda: [log.close() for log in self.logs])
            self._held = held.pop_all()
        preload()  # Orbax takes 0.4 s to import: in a thread, while the step compiles
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """Read the newest whole checkpoint into the structure, dtypes and shardings of ``shapes``.

        Returns:
            The state, and the info that `save` was given; None if there is no checkpoint.

        Raises:
            CheckpointError: no checkpoint is whole, it is of another model, or the directory holds files of two runs.
        """
        if self.checkpoints is None or self.newest is None:
            return None
        state, found = restore_state(self.checkpoints, shapes)
        written = found.info.get("run")  # None in files of version 0.1
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
        """Return the `Info` of the newest readable checkpoint in a run directory, or None if there is none."""
        checkpoints = Checkpoints(Path(directory or ".").expanduser() / "checkpoints")
        for step in reversed([] if directory is None else checkpoints.steps()):
            with contextlib.suppress(CheckpointError):  # a damaged checkpoint: `restore` warns of it
                return checkpoints.info(step)
        return None

    def best(self, shapes: Any, last: Any) -> Any:
        """Return the state of the best checkpoint.

        Args:
            shapes: shapes, dtypes and shardings to read the state in.
            last: the state at the end of the run. It is returned unread if its checkpoint is the best, or if no
                checkpoint has a number for the metric.
        """
        assert self.checkpoints is not None
        self.checkpoints.wait()
        step = self.checkpoints.best()
        return (
            last
            if step in (None, int(jax.device_get(last.step)))
            else restore_state(self.checkpoints, shapes, "best")[0]
        )

    def wait(self) -> None:
        """Wait until the checkpoint under way is written."""
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def save(self, step: int, state: Any, info: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Start to write a checkpoint, and return before it is on disk.

        Args:
            step: step of the state.
            state: the `TrainState`.
            info: JSON-compatible values that `restore` returns.
            metrics: metrics of the state; only single numbers are stored.

        Raises:
            CheckError: the state is not finite, and `save_nonfinite` is False.
            CheckpointError: the directory was removed or taken over by another process, or cannot be written.
        """
        assert self.checkpoints is not None
        if not self.save_nonfinite and (bad := not_finite(state)):
            kept = f"checkpoint {self.newest} is the newest" if self.newest is not None else "there is no checkpoint"
            raise CheckError(
                f"after step {step} {first_names(bad)} {'is' if len(bad) == 1 else 'are'} not finite: nothing is saved "
                f"over what is in {self.directory}, where {kept}; a smaller learning rate or Trainer(clip=1.0) may "
                "help; fit(save_nonfinite=True), --save-nonfinite, saves such a state, too"
            )
        all_or_none(lambda: self.writer.check() if jax.process_index() == 0 else None)
        numbers = {name: x for name, x in metrics.items() if isinstance(x, int | float)}
        rows = self.logs[0].mark if self.logs else None
        self.checkpoints.save(step, state, {**info, "run": self.id, "rows": rows}, numbers)
        self.newest = step

    def noted(self, name: str) -> Any:
        """Return the value that `note` wrote under a name, or None."""
        return (self._config() or {}).get(name)

    def note(self, name: str, value: Any) -> None:
        """Write a value that the run found out about itself into its ``config.json``.

        Does nothing if there is no ``config.json``, if the value is None, or if it is there already.
        """
        if value is None or self.notes.get(name) == value or jax.process_index() > 0:
            return
        self.notes[name] = value
        config = self._config()
        if config is None or self.directory is None or config.get(name) == value:
            return
        with self._writable():
            checksummed_json.write(self.directory / "config.json", {**config, name: value})

    def _config(self) -> dict[str, Any] | None:
        """Read ``config.json``; None if it is missing or cannot be read."""
        try:
            return (
                None if self.directory is None else checksummed_json.read(self.directory / "config.json", unsealed=True)
            )
        except (OSError, ValueError):
            return None

    def begin(self, step: int | None) -> list[dict[str, Any]]:
        """Open the logs.

        Warns if the JSONL log does not hold the rows that it held when the checkpoint was saved.

        Args:
            step: the step that the run resumes from; None for a fresh run.

        Returns:
            The rows of the run so far, on the first process; an empty list on the others.
        """
        if self.directory is None or jax.process_index() > 0:
            return []
        self.note("run", self.id)
        rows, events = self.directory / "metrics.jsonl", self.directory / "tensorboard"
        killed = step is None and any(events.glob("events.*"))  # before its first checkpoint: drop all its events
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
        """Write one row to the logs. TensorBoard gets single numbers only."""
        if not self.logs:
            return
        with self._writable():
            self.logs[0].write({name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in row.items()})
            self.logs[1].write({name: x for name, x in row.items() if isinstance(x, int | float)})

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Check that the lock is still held, and raise an OSError of the block as `CheckpointError`."""
        self.writer.check()
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"the run directory {self.directory} cannot be written: {error.strerror}; make room "
                                  f"and resume, or choose another directory") from error  # fmt: skip


def new_id() -> str:
    """Make a unique name for a run: 12 hexadecimal digits.

    >>> len(new_id())
    12
    """
    return uuid.uuid4().hex[:12]


def _number(x: Any) -> Any:
    """Convert a value that was read from JSON back: a list to an array, a string to NaN or an infinity."""
    if isinstance(x, list):
        array = np.asarray(x)
        return array.astype(float) if array.dtype.kind == "U" else array
    return float(x) if isinstance(x, str) else x
