"""Entries of JAX's cache of compiled programs with a digest behind each, so that no damaged one is ever run.

JAX takes what is in a file for a program: zlib sees most damage, zstandard, where that is installed, sees none. Of 44
runs with one bit flipped in a cached program 8 crashed and 1 ended with other numbers. Here an entry is JAX's own,
followed by the SHA-256 of its key and its bytes in a frame that both ignore, so that JAX reads the same directory
without this. What is no such entry, or another program's, is removed, and compiled and written anew; a file appears
whole or not at all.
"""

import contextlib
import hashlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Maker = Callable[[str], Any]
"""From a directory to JAX's cache there, and the directory."""

PART = ".part"
"""What the names of files end with that are being written."""

STALE_SECONDS = 3600
"""After so long a file that was being written is one that a killed process left."""

_FRAME = struct.pack("<II", 0x184D2A50, hashlib.sha256().digest_size)  # of zstandard's format: to be skipped
_LENGTH = len(_FRAME) + hashlib.sha256().digest_size


def sealed(key: str, program: bytes) -> bytes:
    """The entry of a program: what JAX writes, and behind it the digest.

    >>> opened("a", sealed("a", b"program")), opened("b", sealed("a", b"program")), opened("a", b"program")
    (b'program', None, None)
    """
    return program + _FRAME + _digest(key, program)


def opened(key: str, entry: bytes) -> bytes | None:
    """What was sealed under this key; None where the entry is anything else."""
    program, frame = entry[:-_LENGTH], entry[-_LENGTH:]
    return program if frame == _FRAME + _digest(key, program) else None


def plain(key: str, entry: bytes) -> bytes | None:
    """`opened`, or an entry that JAX has written without this, if zlib's own checksum holds."""
    program = opened(key, entry)
    if program is None and _FRAME not in entry:
        with contextlib.suppress(zlib.error):
            zlib.decompress(entry)
            return entry
    return program


def _digest(key: str, program: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + program).digest()


def maker(read: Callable[[str, bytes], bytes | None] = opened) -> Maker | None:
    """What makes caches of files whose entries are sealed, for `use`. None where JAX makes its caches in other ways."""
    try:
        from jax._src.compilation_cache_interface import CacheInterface
    except ImportError:
        return None
    if (now := current()) is None:
        return None
    jaxs = getattr(now, "jaxs", now)

    class Checked(CacheInterface):
        """JAX's cache of files, which knows neither of damage nor of a writer that is killed."""

        def __init__(self, directory: str):
            self._path: Any = Path(directory)
            self._inner = jaxs(directory)[0]

        def get(self, key: str) -> bytes | None:
            try:
                entry = self._inner.get(key)
            except OSError:  # removed between two looks, by another process; or it cannot be read
                return None
            program = None if entry is None else read(key, entry)
            if entry is not None and program is None:
                self._file(key).unlink(missing_ok=True)
            return program

        def put(self, key: str, value: bytes) -> None:
            if getattr(self._inner, "eviction_enabled", True):  # which has files of its own
                self._inner.put(key, sealed(key, value))
            elif not self._file(key).exists():
                _write(self._file(key), sealed(key, value))

        def _file(self, key: str) -> Path:
            return self._path / f"{key}-cache"

    def make(directory: str) -> tuple[Any, str]:
        return Checked(directory), directory

    make.jaxs = jaxs  # pyright: ignore[reportFunctionMemberAccess]
    return make


def current() -> Maker | None:
    """What makes JAX's caches now."""
    try:
        from jax._src import compilation_cache
    except ImportError:
        return None
    return getattr(compilation_cache, "get_file_cache", None)


def use(make: Maker) -> None:
    """Let this make JAX's caches from now on; the one that is there is made anew."""
    from jax._src import compilation_cache

    compilation_cache.get_file_cache = make
    compilation_cache.reset_cache()  # JAX makes one at its first compilation, and keeps it


def _write(file: Path, entry: bytes) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}{PART}")
    try:
        part.write_bytes(entry)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove what killed processes left half-written."""
    for part in directory.glob(f"*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink(missing_ok=True)
