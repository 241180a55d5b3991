"""The command line: ``sapwood COMMAND ...`` or ``python -m sapwood COMMAND ...``.

`COMMANDS` lists the commands; the module `sapwood.command.NAME` implements each one. Only the module of the chosen
command is imported.
"""

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from sapwood.command import starting
from sapwood.core.errors import SapwoodError
from sapwood.core.messages import nearest

COMMANDS = {
    "train": "train a recipe, or go on with a run",
    "evaluate": "the test metrics of a run",
    "predict": "class and probability of image files, by a run",
    "summary": "a recipe's layers, shapes, parameters and FLOPs",
    "graph": "a recipe's model as SVG or HTML",
    "shardings": "where everything of a recipe lives on a mesh, before any device is there",
    "profile": "where the time of a recipe's training step goes, by layer path",
    "recipes": "the recipes there are",
    "doctor": "versions, devices, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An expected error (`SapwoodError`, OSError) prints one line and gives exit code 2; ``--debug`` also prints its
    traceback. Ctrl-C gives 130. ``arguments=None`` takes those of the process.
    """
    if arguments is None:  # called as the main program
        starting.ready()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if arguments[:1] == ["train"] else ""
        _say(f"\nsapwood: stopped{hint}")
        return 130
    except BrokenPipeError:  # the reader of a pipe is gone; training continues without one, see `runtime.terminal`
        return 0
    except (SapwoodError, OSError) as error:
        if debug:
            traceback.print_exc()
        _say(f"sapwood: error: {_one_line(error)}")
        return 2
    finally:
        warnings.formatwarning = before
        _let_go(sys.stdout)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: sapwood COMMAND ...\n")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        print("\n  sapwood COMMAND --help says more; --debug shows the traceback of an error")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import sapwood

        print(sapwood.__version__)
        return 0
    if arguments[0] not in COMMANDS:
        raise SapwoodError(f"there is no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}")
    module = importlib.import_module(f"sapwood.command.{arguments[0]}")
    return module.main(arguments[1:]) or 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # if nobody reads it, the exit code remains
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


def _let_go(out: Any) -> None:
    """Redirect a stream whose reader is gone to the null device. Otherwise Python reports an error at exit."""
    if out is None:
        return
    try:
        out.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, out.fileno())
            os.close(nowhere)


def _one_line(error: Exception) -> str:
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in note]
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    return " ".join(" ".join([said, *(f"({note})" for note in dict.fromkeys(notes[:1] + notes[-1:]))]).split())


def _warning(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """Format a warning: Sapwood's own in one line without the line of code, others as Python does."""
    if category.__module__.startswith("sapwood"):
        return f"sapwood: warning: {message}\n"
    return _PLAIN(message, category, *where)


_PLAIN = warnings.formatwarning


if __name__ == "__main__":
    sys.exit(main())
