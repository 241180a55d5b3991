"""Which functions a model is in while it is traced: those with a cursor, and those of arrays, of `layers` and `jax.nn`.

A layer says itself that it is called. A plain function does not, so Python's profiling hook looks. A function whose
first or second argument is a cursor computes in the scope of that cursor, whatever it computes. A function of arrays
counts where the model or a layer calls it. The operations of either kind carry its number in their name stacks.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sapwood.core import paths
from sapwood.core.fingerprint import installed
from sapwood.core.vars import Vars

_CORE, _LAYERS = (str(Path(__file__).parents[1] / room) for room in ("core", "layers"))
_ARRAYS = (_LAYERS, str(Path(jax.__file__).parent / "_src" / "nn"))


class Named(NamedTuple):
    """A function that was called: with a cursor at ``path``, or one of arrays by its ``name``."""

    path: paths.Path
    name: str


@contextlib.contextmanager
def watching(note: Callable[[Named], str]) -> Iterator[None]:
    """Within the block operations are named by the functions that they are in; ``note`` gives each call its name."""
    opened: dict[int, Any] = {}
    before = sys.getprofile()

    def hook(frame: Any, event: str, _: Any) -> None:
        if event == "call" and (found := _named(frame)) is not None:
            opened[id(frame)] = scope = jax.named_scope(note(found))
            scope.__enter__()
        elif event == "return" and id(frame) in opened:
            opened.pop(id(frame)).__exit__(None, None, None)

    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(before)


def _named(frame: Any) -> Named | None:
    """What a function is called with, or as; None where it is neither."""
    code = frame.f_code
    names = code.co_varnames[: min(code.co_argcount, 2)]
    if code.co_filename.startswith(_ARRAYS):
        public = code.co_name[0] not in "_<" and names[:1] != ("self",) and not code.co_flags & inspect.CO_NESTED
        by = frame.f_back.f_code
        return Named((), code.co_name) if public and (_own(by) or by.co_name == "__call__") else None
    if not names or not _own(code):
        return None
    given = (frame.f_locals.get(name) for name in names)
    return next((Named(x._path, "") for x in given if isinstance(x, Vars)), None)


def _own(code: Any) -> bool:
    """Whether code is of a model, not of what models are made with."""
    return not (installed(code.co_filename, "") or code.co_filename.startswith((_CORE, _LAYERS)))
