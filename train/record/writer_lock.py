"""`DirectoryLock`: a lock that lets one process write to a run directory, and a record of who holds it.

The operating system releases the lock when its process ends, even by a kill. So a killed run leaves nothing to clean up
by hand. On some file systems that machines share, locks hold within one machine only. So the writer also touches its
record every `BEAT` seconds. A process that finds the record of another machine waits up to `PATIENCE` seconds: a touch
in that time means that the writer is alive, no touch that it is gone. Clocks of two machines are never compared.
"""

import contextlib
import errno
import functools
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from sapwood.core.errors import CheckpointError
from sapwood.runtime.processes import run_on_first_process
from sapwood.runtime.terminal import say
from sapwood.saving.checkpoint_directory import Directory

LOCK = "writer.lock"
RECORD = "writer.json"
BEAT = 5.0
"""Seconds between two touches of the record."""
PATIENCE = 30.0
"""Seconds without a touch after which a writer on another machine counts as gone."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class DirectoryLock:
    """Exclusive right to write to a run directory: a context manager, which may be entered again while it is held.

    It converts to the path of the directory (`os.fspath`), so `fit(run=writer)` writes to a directory that is locked
    already. With several processes the first one holds the lock for all. A missing directory is made; it is removed at
    the end if it is still empty.

    Args:
        directory: path of the run directory.

    Raises:
        ConfigError: the path cannot be a run directory.
        CheckpointError: on entering, if another process writes to the directory (the message has its host, process id
            and start time), or if the directory cannot be written.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with DirectoryLock(directory) as writer:
    ...     try:
    ...         DirectoryLock(directory).__enter__()
    ...     except CheckpointError as error:
    ...         print(f"process {os.getpid()} on {socket.gethostname()}" in str(error))
    True
    >>> os.listdir(directory)
    []
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).expanduser()
        Directory(self.directory).check_name()
        self._depth, self._made, self._lock = 0, False, None
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()

    def __fspath__(self) -> str:
        return str(self.directory)

    def __enter__(self) -> "DirectoryLock":
        if self._depth == 0:
            run_on_first_process(self._take)
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and jax.process_index() == 0:
            self._give_back()

    def check(self) -> None:
        """Raise `CheckpointError` if the directory was removed or taken over by another process since entering."""
        found = self._read()
        if found is None:
            raise CheckpointError(
                f"{self.directory} was removed, or its {RECORD} was, while this run was writing there; nothing more is "
                "written"
            )
        if found and found["token"] != self._token:
            raise CheckpointError(
                f"{self.directory} was taken over by {_name(found)}, because this run gave no sign of life for "
                f"{PATIENCE:.0f} s; nothing more is written"
            )

    def _take(self) -> None:
        """Lock the directory, write the record, and start to touch it."""
        self._made = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = self._lock_now()
            before = self._read()
            if not free:
                raise self._busy(before or self._read_soon())
            if before is not None:
                self._await_the_end_of(before)
            self._write()
        except OSError as error:
            self._give_back()
            raise CheckpointError(
                f"the run directory {self.directory} cannot be written: {error.strerror}; choose another directory "
                "(run=, --run), or make room"
            ) from error
        except BaseException:
            self._give_back()
            raise
        self._ended.clear()
        threading.Thread(target=self._beat, name="sapwood-writer", daemon=True).start()

    def _lock_now(self) -> bool:
        """Try to take the lock, and return False if another process holds it.

        Returns True also on a file system without locks.
        """
        import filelock

        lock = filelock.FileLock(self.directory / LOCK, thread_local=False)
        try:
            lock.acquire(timeout=0.3, poll_interval=0.05)
        except filelock.Timeout:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return True
        self._lock = lock
        return True

    def _await_the_end_of(self, before: dict[str, Any]) -> None:
        """Wait until the writer of the record ``before`` counts as gone, then remove the record.

        If this process holds the lock and the record is of this machine, that writer is gone already.

        Raises:
            CheckpointError: the writer touches its record, so it is alive.
        """
        if self._lock is None or before.get("machine") != machine():
            touched = self._touched()
            say(
                f"sapwood: {self.directory} was not closed by {_name(before)}; this is another machine, which waits up "
                f"to {PATIENCE:.0f} s for a sign that it still runs"
            )
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                time.sleep(min(1.0, BEAT))
                if (now := self._touched()) is not None and now != touched:
                    raise self._busy(self._read())
        (self.directory / RECORD).unlink(missing_ok=True)

    def _touched(self) -> int | None:
        """Return the time of the last touch in nanoseconds, or None if it cannot be read."""
        with contextlib.suppress(OSError), (self.directory / RECORD).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns  # stat of an open file, for which NFS asks the server
        return None

    def _write(self) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine(), "token": self._token,
                  "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}  # fmt: skip
        try:
            with (self.directory / RECORD).open("x", encoding="utf-8") as file:  # "x": another may be as quick
                file.write(json.dumps(record, indent=2) + "\n")
        except FileExistsError:
            raise self._busy(self._read_soon()) from None

    def _read(self) -> dict[str, Any] | None:
        """Read the record: None if there is none, an empty dict if it cannot be read or is not complete."""
        try:
            found = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and {"token", "host", "pid", "since"} <= found.keys() else {}

    def _read_soon(self) -> dict[str, Any]:
        """Read the record of a writer that may still be writing it: wait up to one second for all of it."""
        for _ in range(20):
            if found := self._read():
                return found
            time.sleep(0.05)
        return {}

    def _busy(self, record: dict[str, Any] | None) -> CheckpointError:
        since = f", since {record['since']}" if record else ""
        return CheckpointError(
            f"{self.directory} is being written by {_name(record or {})}{since}; a run has one writer: wait for it, "
            "stop it, or choose another directory"
        )

    def _beat(self) -> None:
        """Touch the record every `BEAT` seconds until the lock is released; runs in a thread."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError, CheckpointError):  # the run's next `check` raises it
                self.check()
                os.utime(self.directory / RECORD)

    def _give_back(self) -> None:
        """Remove the record and release the lock; remove the directory if it was made and is empty."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if (self._read() or {}).get("token") == self._token:
                (self.directory / RECORD).unlink()
        if self._lock is not None:
            with contextlib.suppress(OSError):  # Windows cannot remove an open file
                (self.directory / LOCK).unlink()  # while held, so a waiting process sees that it is gone
            self._lock.release()
            self._lock = None
        if self._made:
            with contextlib.suppress(OSError):  # the directory is not empty
                self.directory.rmdir()


@functools.cache
def machine() -> str:
    """Identify this machine until it restarts, also among machines of the same name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"


def _name(record: dict[str, Any]) -> str:
    return f"process {record['pid']} on {record['host']}" if record else "another process"
