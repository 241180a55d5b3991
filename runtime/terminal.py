"""Printing lines for people, without failing if nobody can read them.

A line is lost if the reader of a pipe has gone or if there is no stdout or stderr; the program goes on.
"""

import sys
from typing import TextIO


def say(text: str, out: TextIO | None = None) -> bool:
    """Print a line on `out`, by default stderr. Returns False if that is not possible.

    >>> say("step 1", sys.stdout)
    step 1
    True
    """
    out = sys.stderr if out is None else out
    if out is None:  # `print(file=None)` would print on stdout
        return False
    try:
        print(text, file=out, flush=True)
    except (OSError, ValueError, RuntimeError):  # no reader, a closed file, a signal handler that interrupts a print
        return False
    return True


def is_terminal(out: TextIO | None) -> bool:
    """True if `out` is a terminal. None, a closed file and an object without `isatty` are none.

    >>> is_terminal(None)
    False
    """
    try:
        return bool(out is not None and out.isatty())
    except (AttributeError, OSError, ValueError):
        return False
