"""Compiled programs kept on disk, so that a run that starts again need not compile again: JAX's persistent cache.

JAX's cache is a global setting. Here it is set within a block and put back after it, and nowhere else. Of blocks in
several threads the last one to begin is in force, and the last one to end puts back what was before them all. Entries
hold machine code, so processors of different kinds that share a home directory have a directory each, and each entry
has a digest (`cache_entries`).
"""

import contextlib
import hashlib
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sapwood.core.errors import ConfigError
from sapwood.runtime import compile_cache_entries

ROOM = 2 << 30
"""Bytes of entries that stay; the oldest go first."""

_DIRECTORY = "jax_compilation_cache_dir"

_MAKE = "make"
"""Beside JAX's settings: what makes its caches."""

_settings = threading.Lock()
"""Held while JAX's settings change, and while `unwritten` has changed one."""

_blocks: list[dict[str, Any]] = []
"""The settings of the blocks that have begun and not ended, of all threads."""

_outside: dict[str, Any] = {}
"""The settings before the first of these."""


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
    chosen, make = _directory(where), compile_cache_entries.maker()
    if chosen is None or make is None:  # without a digest of each entry there is no cache
        yield None
        return
    settings = {
        _DIRECTORY: str(chosen),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # a start compiles many small programs
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # files of XLA's own beside the entries, which nothing checks
        _MAKE: make,
    }
    with _settings:
        if not _blocks:
            _outside.update({name: getattr(jax.config, name) for name in settings if name != _MAKE})
            _outside[_MAKE] = compile_cache_entries.current()
        _blocks.append(settings)
        _set(settings)
    try:
        yield chosen
    finally:
        with _settings:
            _blocks[:] = [block for block in _blocks if block is not settings]
            _set(_blocks[-1] if _blocks else _outside)
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
    for name, value in settings.items():
        if name != _MAKE:
            jax.config.update(name, value)
    compile_cache_entries.use(settings[_MAKE])


def _entries(directory: Path) -> list[Path]:
    return list(directory.glob("*-cache"))


def _tidy(directory: Path) -> None:
    """Remove the oldest entries beyond `ROOM`, and what killed processes left half-written."""
    with contextlib.suppress(OSError):
        found = sorted(((path.stat(), path) for path in _entries(directory)), key=lambda x: -x[0].st_mtime_ns)
        total = 0
        for stat, path in found:
            total += stat.st_size
            if total > ROOM:
                path.unlink(missing_ok=True)
        compile_cache_entries.sweep(directory)
