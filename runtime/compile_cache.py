"""JAX's persistent cache of compiled programs, so that a run that starts again does not compile again.

The cache is a global setting of JAX. Only `compile_cache` sets it, for a ``with`` block, and restores it afterwards. If
blocks of several threads overlap, the settings of the last one to begin are in force, and the last one to end restores
the settings from before all of them. Entries hold machine code, so each kind of processor has a directory of its own.
Each entry has a digest (`compile_cache_entries`).
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
"""Bytes of entries that are kept. The oldest entries are removed first."""

_DIRECTORY = "jax_compilation_cache_dir"

_MAKE = "make"
"""Key of the function that makes JAX's caches, among JAX's settings."""

_settings = threading.Lock()
"""Lock that is held while JAX's settings change, and for the whole block of `unwritten`."""

_blocks: list[dict[str, Any]] = []
"""The settings of all active `compile_cache` blocks, of all threads, in the order in which they began."""

_outside: dict[str, Any] = {}
"""The settings before the first active block."""


def default_directory() -> Path:
    """The default cache directory, with a subdirectory for this kind of processor.

    It is in ``$SAPWOOD_CACHE/xla``, or if that variable is not set, in ``sapwood/xla`` of the user's cache directory.
    """
    root = os.environ.get("SAPWOOD_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapwood"
    return Path(root).expanduser() / "xla" / _processor()


def _processor() -> str:
    """A name for this kind of processor: its architecture and a hash of its features."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def compile_cache(where: Any = True) -> Iterator[Path | None]:
    """Within the block, store compiled programs in a directory and load programs that are there already.

    ``where`` is the directory. True means `default_directory`, unless JAX's own setting (``jax_compilation_cache_dir``)
    names one. None and False change nothing. The block gets the directory, or None if Sapwood sets no cache. A program
    from the cache has the same bits as one that is compiled. The end of the block waits for a program that a thread is
    compiling (`compile_options.UpgradingProgram`).

    Raises:
        ConfigError: `where` has a wrong type, or names a directory that cannot be made.

    >>> import tempfile
    >>> with compile_cache(tempfile.mkdtemp()) as directory:
    ...     jax.jit(lambda x: x + 1)(1).item()
    2
    >>> any(path.name.endswith("-cache") for path in directory.iterdir())
    True
    """
    chosen, make = _directory(where), compile_cache_entries.maker()
    if chosen is None or make is None:  # if entries cannot have digests, no cache is used
        yield None
        return
    settings = {
        _DIRECTORY: str(chosen),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # cache all programs: a start compiles many small ones
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",  # XLA's own cache files have no digest
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
    """True if JAX's persistent cache is on now.

    >>> import tempfile
    >>> with compile_cache(tempfile.mkdtemp()):
    ...     active()
    True
    """
    return bool(getattr(jax.config, _DIRECTORY)) and jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]


@contextlib.contextmanager
def unwritten() -> Iterator[None]:
    """Within the block, no thread writes a compiled program to disk. Programs are still loaded from there.

    It is for a thread that compiles during a run. The end of a `compile_cache` block waits for this block.
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
    """The directory for `where`, which is created; None if no cache is to be set or the default cannot be made."""
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
    """Remove the oldest entries beyond `ROOM` bytes, and partly written files of killed processes."""
    with contextlib.suppress(OSError):
        found = sorted(((path.stat(), path) for path in _entries(directory)), key=lambda x: -x[0].st_mtime_ns)
        total = 0
        for stat, path in found:
            total += stat.st_size
            if total > ROOM:
                path.unlink(missing_ok=True)
        compile_cache_entries.sweep(directory)
