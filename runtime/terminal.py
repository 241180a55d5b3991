"""Lines for people. Where nobody can read them (a pipe's reader went away, there is no stdout) all else goes on."""

import sys
from typing import TextIO


def say(text: str, out: TextIO | None = None) -> bool:
    """Print a line, on stderr or on `out`; whether that could be done.

    >>> say("step 1", sys.stdout)
    step 1
    True
    """
    out = sys.stderr if out is None else out
    if out is None:  # `print` would take stdout
        return False
    try:
        print(text, file=out, flush=True)
    except (OSError, ValueError, RuntimeError):  # no reader, a closed file, a signal in the middle of another line
        return False
    return True


def is_terminal(out: TextIO | None) -> bool:
    """Whether a terminal shows what is written there; what is no file of the system's may lack `isatty`.

    >>> is_terminal(None)
    False
    """
    try:
        return bool(out is not None and out.isatty())
    except (AttributeError, OSError, ValueError):
        return False
