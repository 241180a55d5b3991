"""The one writer of a run directory: a lock of the operating system, and a record of who holds it.

The lock ends with the process that holds it, also where that is killed, so a killed run leaves nothing that a person
has to clear away. Some file systems that machines share keep locks within each machine only. So the writer also
touches its record every `BEAT` seconds, and who finds the record of another machine waits up to `PATIENCE` seconds: a
touch says that the writer lives, none that it is gone. No clocks of two machines are compared.
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
from sapwood.runtime.processes import by_the_first
from sapwood.runtime.terminal import say
from sapwood.saving.checkpoint_directory import Directory

LOCK = "writer.lock"
RECORD = "writer.json"
BEAT = 5.0
"""Seconds between two touches of the record."""
PATIENCE = 30.0
"""Seconds without a touch after which a writer on another machine counts as gone."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Writer:
    """A run directory that nobody else may write to meanwhile: a context manager, which may be entered again inside.

    It stands for the directory's path (`os.fspath`), so `fit(run=writer)` writes to a directory that is held already.
    Of several processes the first one holds it for all. The directory is made if need be, and removed again at the end
    if it was made and is empty.

    Raises `ConfigError` for a path that can be none; entering raises `CheckpointError` where another process writes to
    the directory, with its host, number and start.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with Writer(directory) as writer:
    ...     try:
    ...         Writer(directory).__enter__()
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

    def __enter__(self) -> "Writer":
        if self._depth == 0:
            by_the_first(self._take)
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and jax.process_index() == 0:
            self._give_back()

    def check(self) -> None:
        """`CheckpointError` where the directory was removed, or taken by another, since it was entered."""
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
        """Whether the lock is ours now, or there are no locks on this file system."""
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
        """Go on where the writer of this record is gone; `CheckpointError` where it lives."""
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
        with contextlib.suppress(OSError), (self.directory / RECORD).open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns  # of an open file: NFS asks the server for it
        return None

    def _write(self) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine(), "token": self._token,
                  "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}  # fmt: skip
        try:
            with (self.directory / RECORD).open("x", encoding="utf-8") as file:  # another may have been as quick
                file.write(json.dumps(record, indent=2) + "\n")
        except FileExistsError:
            raise self._busy(self._read_soon()) from None

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and {"token", "host", "pid", "since"} <= found.keys() else {}

    def _read_soon(self) -> dict[str, Any]:
        """The record of a writer that may not have written it to its end yet."""
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
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError, CheckpointError):  # which the next `check` says
                self.check()
                os.utime(self.directory / RECORD)

    def _give_back(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            if (self._read() or {}).get("token") == self._token:
                (self.directory / RECORD).unlink()
        if self._lock is not None:
            with contextlib.suppress(OSError):  # Windows removes no open file
                (self.directory / LOCK).unlink()  # while it is held: who waits for it sees that it is gone
            self._lock.release()
            self._lock = None
        if self._made:
            with contextlib.suppress(OSError):  # it is not empty
                self.directory.rmdir()


@functools.cache
def machine() -> str:
    """What tells this machine, as long as it runs, from others; also where two have one name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"


def _name(record: dict[str, Any]) -> str:
    return f"process {record['pid']} on {record['host']}" if record else "another process"
