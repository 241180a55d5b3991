"""`TensorBoardLog`: rows of metrics as TensorBoard event files.

The file format is written by hand here, in forty lines. tensorboardX imports PyTorch if that is installed (2 s).
TensorBoard's own writer brings 50 MB, and imports TensorFlow if that is installed; so does flax's.
"""

import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class TensorBoardLog:
    """Writes the numbers of each row as TensorBoard scalars, into a new event file.

    Args:
        directory: folder of the event file; made if missing.
        after: the step that a run resumes from: TensorBoard then drops later steps of earlier files. None drops
            nothing.

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
            self._event(_field(2, after + 1) + _field(7, _field(1, 1)))  # a SessionLog START drops later steps

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row as an event of its "step". Values that are not single numbers are left out."""
        values = b""
        for name, value in row.items():
            left_out = isinstance(value, (str, bool, np.bool_, dict, list, tuple, type(None))) or np.size(value) != 1
            if name != "step" and not left_out:
                scalar = _field(1, name.encode()) + b"\x15" + _float32(value)
                values += _field(1, scalar)
        self._event(_field(2, int(row["step"])) + _field(5, values))

    def _event(self, fields: bytes) -> None:
        """Write one event, with the wall time in front of its encoded ``fields``, as a TFRecord."""
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        head = struct.pack("<Q", len(event))
        self._file.write(head + _masked_crc(head) + event + _masked_crc(event))

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> "TensorBoardLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _float32(value: Any) -> bytes:
    """Encode a number as float32 in four bytes, little-endian.

    A number beyond float32, such as a large perplexity, becomes infinity.
    """
    if isinstance(value, int) and abs(value) > 10**38:  # NumPy raises if it does not fit into float64 either
        value = math.copysign(math.inf, 1 if value > 0 else -1)
    with np.errstate(over="ignore"):
        return np.array(value, "<f4").tobytes()


def _field(number: int, value: int | bytes) -> bytes:
    """Encode one field of a protocol buffer: an integer as a varint, bytes with their length."""
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
    """Compute the CRC-32C of data, masked as in TFRecord files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
