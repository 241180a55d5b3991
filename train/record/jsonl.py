"""`JsonlLog`: the metrics of a run as JSON lines, one row a line.

A row is a dict of numbers with a "step". It is in the file as soon as `write` returns. When a run resumes, the rows
past the step that it resumes from are cut off, so the log is that of an unbroken run. `TensorBoardLog` does the same
for TensorBoard events.
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
"""Key in each line for the id of the run."""


class JsonlLog:
    """Appends rows to a file, one JSON object a line.

    JSON has no NaN and no infinities: they are written as strings that `float` reads.

    Args:
        path: the file. Missing folders are made.
        after: the step that a run resumes from: rows of later steps, and an incomplete last line, are cut off. None
            starts a new log.
        run: id of the run, written into each line; `read_rows` leaves it out. None writes no id.

    Raises:
        CheckpointError: the log has rows of a run with another id.
        DataError: with ``after``, a line up to that step is not a JSON object.

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
        as_is = getattr(os, "O_BINARY", 0)  # without it Windows writes "\n" as two bytes
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | as_is, 0o666)
        os.ftruncate(self._file, keep)
        self._written = hashlib.sha256(self.path.read_bytes())

    @property
    def mark(self) -> str:
        """Digest of everything in the log: SHA-256 in hexadecimal digits, equal for logs with the same bytes.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with JsonlLog(path) as log:
        ...     log.write({"step": 1})
        >>> JsonlLog(path, after=1).mark == log.mark != JsonlLog(path, after=0).mark
        True
        """
        return self._written.hexdigest()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. If the disk is full this raises OSError, and no part of the row stays in the file."""
        row = {**row, RUN: self.run} if self.run is not None else row
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n"
        whole = data = line.encode()
        before = os.fstat(self._file).st_size
        try:
            while data:  # one call, unless the disk fills up half-way: then the next call raises
                data = data[os.write(self._file, data) :]
        except OSError:
            os.ftruncate(self._file, before)  # else the next row would continue this incomplete line
            raise
        self._written.update(whole)

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "JsonlLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the rows of a JSONL log, without the id of the run. An incomplete last line is left out.

    NaN and infinities are strings, as `JsonlLog` writes them.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a line is not a JSON object; the message has its number.
    """
    return [{name: x for name, x in row.items() if name != RUN} for row, _ in _rows(Path(path).expanduser())]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row with the offset of its end in bytes. An incomplete last line is left out."""
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
    """Return the length in bytes of the log up to and including `step`."""
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
    """Convert a value to what JSON can hold; NaN and infinities become strings."""
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
