"""Logs of a run: rows of metrics as JSON lines, and as TensorBoard events.

A row is a dict of numbers with a "step". Both logs are on disk as soon as `write` returns, and both take up a run
that was interrupted: what was logged past the step it resumes from is taken back, so that the log is that of an
unbroken run.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import CheckpointError, DataError

RUN = "run"
"""The entry of a line that says of which run it is."""


class JsonlLog:
    """Append rows to the file at `path`, one JSON object per line.

    `after` is the step a run resumes from: rows of later steps, and a line that was only half written, are cut off.
    None starts a new log. With `run`, the id of a run, each line ends with it, and a log that another run has written
    is a `CheckpointError`; `read_rows` leaves it out. NaN and the infinities, which JSON lacks, are written as strings
    that `float` reads.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> for after in (None, 1):  # a run, and the same run resumed from step 1
    ...     with JsonlLog(path, after=after) as log:
    ...         log.write({"step": 1 + (after or 0), "loss": np.float32(0.5)})
    >>> print(path.read_text(), end="")
    {"step": 1, "loss": 0.5}
    {"step": 2, "loss": 0.5}
    """

    def __init__(self, path: str | os.PathLike, *, after: int | None = None, run: str | None = None):
        self.path, self.run = Path(path).expanduser(), run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep = 0 if after is None else _length_until(self.path, after, run)
        as_is = getattr(os, "O_BINARY", 0)  # Windows would write "\n" as two bytes
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | as_is, 0o666)
        os.ftruncate(self._file, keep)
        self._written = hashlib.sha256(self.path.read_bytes())

    @property
    def mark(self) -> str:
        """What stands for all that the log holds: two logs have one mark where they hold the same bytes.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with JsonlLog(path) as log:
        ...     log.write({"step": 1})
        >>> JsonlLog(path, after=1).mark == log.mark != JsonlLog(path, after=0).mark
        True
        """
        return self._written.hexdigest()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        row = {**row, RUN: self.run} if self.run is not None else row
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n"
        whole = data = line.encode()
        before = os.fstat(self._file).st_size
        try:
            while data:  # one call for all of it, but for a disk that fills up half-way: then the next one raises
                data = data[os.write(self._file, data) :]
        except OSError:
            os.ftruncate(self._file, before)  # or the next row, once there is room, would go on in the middle of this
            raise
        self._written.update(whole)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "JsonlLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a JSONL log, as `JsonlLog.write` was given them; a last line that is only half written is left out.

    Raises FileNotFoundError, and DataError naming the line that is no JSON object.
    """
    return [{name: x for name, x in row.items() if name != RUN} for row, _ in _rows(Path(path).expanduser())]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows, each with the offset at which it ends."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: this is no JSON object: {line[:60]!r}")
            yield row, end


def _length_until(path: Path, step: int, run: str | None) -> int:
    """How many bytes of the log belong to the steps up to `step`."""
    keep = 0
    if path.exists():
        for row, end in _rows(path):
            if row.get("step", 0) > step:
                break
            if run is not None and row.get(RUN, run) != run:
                raise CheckpointError(
                    f"{path} holds rows of two runs, {row[RUN]} and {run}: something else has written to it; move it "
                    "away to go on with a new one, or choose another directory"
                )
            keep = end
    return keep


def _plain(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    array = np.asarray(value)
    if array.size != 1:
        return _plain(array.tolist())
    number = array.item()
    if isinstance(number, float) and not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return number
