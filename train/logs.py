"""Logs of a run: rows of metrics as JSON lines, and as TensorBoard events.

A row is a dict of numbers with a "step". Both logs are on disk as soon as `write` returns, and both take up a run
that was interrupted: what was logged past the step it resumes from is taken back, so that the log is that of an
unbroken run.
"""

import hashlib
import json
import math
import os
import socket
import struct
import time
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


class TensorBoardLog:
    """Write the numbers of each row as TensorBoard scalars, into a new event file in `directory`.

    `after` is the step a run resumes from: TensorBoard then drops what earlier files have of later steps.
    The format is forty lines, so they are here: tensorboardX imports PyTorch where it is installed (2 s),
    TensorBoard's own writer brings 50 MB and imports TensorFlow where that is installed, as flax's does.

    >>> import tempfile
    >>> with TensorBoardLog(tempfile.mkdtemp()) as log:
    ...     log.write({"step": 1, "loss": 0.5})
    """

    def __init__(self, directory: str | os.PathLike, *, after: int | None = None):
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("xb", buffering=0)
        self._event(_field(3, b"brain.Event:2"))
        if after is not None:
            self._event(_field(2, after + 1) + _field(7, _field(1, 1)))  # a SessionLog START takes back what follows

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; what is no single number is left out."""
        values = b""
        for name, value in row.items():
            left_out = isinstance(value, (str, bool, np.bool_, dict, list, tuple, type(None))) or np.size(value) != 1
            if name != "step" and not left_out:
                scalar = _field(1, name.encode()) + b"\x15" + _float32(value)
                values += _field(1, scalar)
        self._event(_field(2, int(row["step"])) + _field(5, values))

    def _event(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        head = struct.pack("<Q", len(event))
        self._file.write(head + _masked_crc(head) + event + _masked_crc(event))

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()

    def __enter__(self) -> "TensorBoardLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _float32(value: Any) -> bytes:
    """A number in the format's four bytes; infinity for one that they do not hold, such as a large perplexity."""
    if isinstance(value, int) and abs(value) > 10**38:  # for NumPy an error where it is no float64 either
        value = math.copysign(math.inf, 1 if value > 0 else -1)
    with np.errstate(over="ignore"):
        return np.array(value, "<f4").tobytes()


def _field(number: int, value: int | bytes) -> bytes:
    """One protocol buffer field, a varint or a length-delimited one."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _crc_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C as TFRecord files mask it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
