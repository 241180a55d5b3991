"""Entries of JAX's persistent cache with a digest at their end, so that no damaged program is ever run.

JAX does not check the files of its cache. zlib detects most damage; zstandard, if it is installed, detects none. Of 44
runs with one flipped bit in a cached program, 8 crashed and 1 ended with other numbers. Here an entry is JAX's own
entry, followed by the SHA-256 of its key and its bytes. The digest is in a frame that zlib and zstandard ignore, so JAX
can read the same directory without this file. An entry with a wrong digest or key is removed; its program is compiled
and written again. Files are replaced atomically, so a file is whole or does not exist.
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
"""A function from a directory to the pair (cache, directory), like JAX's ``get_file_cache``."""

PART = ".part"
"""Suffix of files that are being written."""

STALE_SECONDS = 3600
"""Seconds after which a file with the suffix `PART` counts as left by a killed process."""

_FRAME = struct.pack("<II", 0x184D2A50, hashlib.sha256().digest_size)  # a skippable frame of zstandard's format
_LENGTH = len(_FRAME) + hashlib.sha256().digest_size


def sealed(key: str, program: bytes) -> bytes:
    """The entry of a program: the bytes that JAX writes, followed by the digest.

    >>> opened("a", sealed("a", b"program")), opened("b", sealed("a", b"program")), opened("a", b"program")
    (b'program', None, None)
    """
    return program + _FRAME + _digest(key, program)


def opened(key: str, entry: bytes) -> bytes | None:
    """The program of an entry that `sealed` made with this key; None for any other entry."""
    program, frame = entry[:-_LENGTH], entry[-_LENGTH:]
    return program if frame == _FRAME + _digest(key, program) else None


def plain(key: str, entry: bytes) -> bytes | None:
    """Like `opened`, but it also accepts an entry of JAX without a digest if zlib's checksum holds."""
    program = opened(key, entry)
    if program is None and _FRAME not in entry:
        with contextlib.suppress(zlib.error):
            zlib.decompress(entry)
            return entry
    return program


def _digest(key: str, program: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + program).digest()


def maker(read: Callable[[str, bytes], bytes | None] = opened) -> Maker | None:
    """A function for `use` that makes caches with sealed entries. None if this version of JAX makes caches otherwise.

    `read` gets a key and an entry, and returns the program or None: `opened` or `plain`.
    """
    try:
        from jax._src.compilation_cache_interface import CacheInterface
    except ImportError:
        return None
    if (now := current()) is None:
        return None
    jaxs = getattr(now, "jaxs", now)

    class Checked(CacheInterface):
        """JAX's file cache, with checked entries and atomic writes."""

        def __init__(self, directory: str):
            self._path: Any = Path(directory)
            self._inner = jaxs(directory)[0]

        def get(self, key: str) -> bytes | None:
            try:
                entry = self._inner.get(key)
            except OSError:  # another process has removed it, or it cannot be read
                return None
            program = None if entry is None else read(key, entry)
            if entry is not None and program is None:
                self._file(key).unlink(missing_ok=True)
            return program

        def put(self, key: str, value: bytes) -> None:
            if getattr(self._inner, "eviction_enabled", True):  # then JAX also writes a time stamp, under a lock
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
    """The function that makes JAX's caches now; None if this version of JAX has no such function."""
    try:
        from jax._src import compilation_cache
    except ImportError:
        return None
    return getattr(compilation_cache, "get_file_cache", None)


def use(make: Maker) -> None:
    """Let JAX make its caches by this function from now on. JAX makes a new cache at its next compilation."""
    from jax._src import compilation_cache

    compilation_cache.get_file_cache = make
    compilation_cache.reset_cache()  # otherwise JAX keeps the cache that it made at its first compilation


def _write(file: Path, entry: bytes) -> None:
    """Write a file atomically: under another name first, then renamed."""
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}{PART}")
    try:
        part.write_bytes(entry)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove partly written files of killed processes."""
    for part in directory.glob(f"*{PART}"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink(missing_ok=True)
