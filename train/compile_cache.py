"""Compiled programs kept on disk, so that a run that starts again need not compile again: JAX's persistent cache.

JAX's cache is a global setting. Here it is set within a block and put back after it, and nowhere else. Entries hold
machine code, so processors of different kinds that share a home directory have a directory each.
"""

import contextlib
import hashlib
import os
import platform
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sapwood.core.errors import ConfigError

ROOM = 2 << 30
"""Bytes of entries that stay; the oldest go first."""

_DIRECTORY = "jax_compilation_cache_dir"
_CLEAN = "clean"
"""The file whose time says up to when every entry was written to its end."""

_settings = threading.Lock()
"""Held while JAX's settings change, and while `unwritten` has changed one."""


def default_directory() -> Path:
    """``$SAPWOOD_CACHE/xla``, else ``sapwood/xla`` in the user's cache directory; therein one for this processor."""
    root = os.environ.get("SAPWOOD_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapwood"
    return Path(root).expanduser() / "xla" / _processor()


def _processor() -> str:
    """A name for what machine code may use here."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def compile_cache(where: Any = True) -> Iterator[Path | None]:
    """Keep what is compiled within the block in a directory, and take from there what is in it.

    ``where`` is the directory; True is `default_directory`, unless JAX's own setting (``jax_compilation_cache_dir``)
    names one; None and False change nothing. Yields the directory, None where there is none. Programs are the same
    bits from the cache. The end of the block waits for a program that is being compiled beside a run
    (`compiling.Relay`). Raises `ConfigError` where a directory that is named cannot be made.

    >>> import tempfile
    >>> with compile_cache(tempfile.mkdtemp()) as directory:
    ...     jax.jit(lambda x: x + 1)(1).item()
    2
    >>> any(path.name.endswith("-cache") for path in directory.iterdir())
    True
    """
    chosen = _directory(where)
    if chosen is None:
        yield None
        return
    settings = {
        _DIRECTORY: str(chosen),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # a start compiles many small programs
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    _mend(chosen)
    with _settings:
        before = {name: getattr(jax.config, name) for name in settings}
        _set(settings)
    try:
        yield chosen
    finally:
        with _settings:
            _set(before)
        _tidy(chosen)


def active() -> bool:
    """Whether JAX keeps compiled programs on disk now.

    >>> import tempfile
    >>> with compile_cache(tempfile.mkdtemp()):
    ...     active()
    True
    """
    return bool(getattr(jax.config, _DIRECTORY)) and jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]


@contextlib.contextmanager
def unwritten() -> Iterator[None]:
    """Write nothing of what is compiled within the block, in any thread, to disk; what is there is taken from there.

    For a thread: the end of a `compile_cache` waits for it.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    with _settings:
        before = getattr(jax.config, name)
        jax.config.update(name, float("inf"))
        try:
            yield
        finally:
            jax.config.update(name, before)


def _directory(where: Any) -> Path | None:
    if where is None or where is False or (where is True and getattr(jax.config, _DIRECTORY)):
        return None
    if where is not True and not isinstance(where, (str, os.PathLike)):
        raise ConfigError(f"compile_cache={where!r}: a directory, True for the user's own, or None is expected")
    directory = Path(default_directory() if where is True else where).expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if where is True:
            return None
        raise ConfigError(f"compile_cache={str(where)!r}: the directory cannot be made: {error.strerror}") from error
    return directory


def _set(settings: dict[str, Any]) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the directory once, at its first compilation


def _entries(directory: Path) -> list[Path]:
    return list(directory.glob("*-cache"))


def _mend(directory: Path) -> None:
    """Remove what a process that was killed has half-written: JAX would warn of it for ever, and not write it anew."""
    with contextlib.suppress(OSError):
        clean = directory / _CLEAN
        since = clean.stat().st_mtime_ns if clean.exists() else 0
        for path in _entries(directory):
            if path.stat().st_mtime_ns >= since and not _whole(path.read_bytes()):
                path.unlink(missing_ok=True)


def _whole(entry: bytes) -> bool:
    """Whether an entry can be unpacked; JAX packs with zstandard where that is installed, else with zlib."""
    try:
        if entry[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard  # pyright: ignore[reportMissingImports]

            zstandard.ZstdDecompressor().decompress(entry)
        else:
            zlib.decompress(entry)
    except ImportError:
        return True
    except Exception:
        return False
    return True


def _tidy(directory: Path) -> None:
    """Remove the oldest entries beyond `ROOM`, and note that all are whole."""
    with contextlib.suppress(OSError):
        found = sorted(((path.stat(), path) for path in _entries(directory)), key=lambda x: -x[0].st_mtime_ns)
        total = 0
        for stat, path in found:
            total += stat.st_size
            if total > ROOM:
                path.unlink(missing_ok=True)
        (directory / _CLEAN).touch()
