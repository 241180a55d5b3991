"""``sapwood COMMAND ...``, also as ``python -m sapwood``."""

import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from sapwood.core.errors import SapwoodError
from sapwood.core.paths import nearest

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
    """Run one command; an expected error is one line and exit code 2, with ``--debug`` a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if arguments[:1] == ["train"] else ""
        print(f"\nsapwood: stopped{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        return 0
    except (SapwoodError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"sapwood: error: {_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = before


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


def _one_line(error: Exception) -> str:
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in note]
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    return " ".join(" ".join([said, *(f"({note})" for note in dict.fromkeys(notes[:1] + notes[-1:]))]).split())


def _warning(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """Sapwood's own are about what was asked for, and say it themselves; others are about a line of code."""
    if category.__module__.startswith("sapwood"):
        return f"sapwood: warning: {message}\n"
    return _PLAIN(message, category, *where)


_PLAIN = warnings.formatwarning


if __name__ == "__main__":
    sys.exit(main())
