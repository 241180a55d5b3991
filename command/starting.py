"""Process setup of a command, before the first slow import: Ctrl-C then prints one line and no traceback.

Importing this module calls `begin`, so `sapwood` imports it first: the imports after it take a second. `ready` ends
this phase.
"""

import itertools
import os
import signal
import sys
from types import FrameType


def is_command(words: list[str]) -> bool:
    """Whether these words start a command of Sapwood: ``sapwood ...`` or ``python -m sapwood ...``.

    >>> is_command(["python", "/usr/bin/sapwood", "train"]), is_command(["python", "-m", "sapwood"])
    (True, True)
    >>> is_command(["python", "train.py", "sapwood"])
    False
    """
    script = any(os.path.splitext(os.path.basename(word))[0] == "sapwood" for word in words[:2])
    return script or any(two in (("-m", "sapwood"), ("-m", "sapwood.__main__")) for two in itertools.pairwise(words))


def begin() -> None:
    """Make Ctrl-C end a command immediately until `ready` is called. There is nothing to clean up yet.

    A `KeyboardInterrupt` in the middle of an import could be caught there, or printed with a long traceback. In a
    process that is not a Sapwood command nothing changes.
    """
    if is_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, _stop)
        except ValueError:  # not the main thread
            return


def ready() -> None:
    """Restore `KeyboardInterrupt` for Ctrl-C, and open the null device for each closed one of stdin, stdout and stderr.

    Otherwise the next file that is opened would get the number of the closed stream, and the output of libraries would
    be written into it.
    """
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number


def _stop(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"\nsapwood: stopped\n")
    finally:
        os._exit(130)


begin()
