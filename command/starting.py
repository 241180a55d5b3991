"""What a command needs before its first import, which takes a second: Ctrl-C is a line then, too, and no traceback."""

import itertools
import os
import signal
import sys
from types import FrameType


def is_command(words: list[str]) -> bool:
    """Whether a process that was started so is a command of Sapwood's, ``sapwood ...`` or ``python -m sapwood ...``.

    >>> is_command(["python", "/usr/bin/sapwood", "train"]), is_command(["python", "-m", "sapwood"])
    (True, True)
    >>> is_command(["python", "train.py", "sapwood"])
    False
    """
    script = any(os.path.splitext(os.path.basename(word))[0] == "sapwood" for word in words[:2])
    return script or any(two in (("-m", "sapwood"), ("-m", "sapwood.__main__")) for two in itertools.pairwise(words))


def begin() -> None:
    """Let Ctrl-C end a command at once, until `ready`: nothing is there yet that would have to be put in order.

    (An exception in the middle of an import may be caught there, or printed with all that led to it.)
    """
    if is_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, _stop)
        except ValueError:  # not the main thread
            return


def ready() -> None:
    """Let Ctrl-C be a `KeyboardInterrupt` again; give each closed one of stdin, stdout and stderr a place that takes
    all, or the next file that is opened would get its number, and what libraries print would be written into it."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _stop(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"\nsapwood: stopped\n")
    finally:
        os._exit(130)


begin()
