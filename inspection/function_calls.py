"""Plain functions that a model calls while it is traced, found with Python's profiling hook (`sys.setprofile`).

A layer reports its own calls (`layer_calls`); a plain function does not. Two kinds of functions are found:

- A function of the model whose first or second argument is a cursor (`Vars`). All that it computes belongs to the
  cursor's scope.
- A public array function of `sapwood.layers` or `jax.nn`, if the model or a layer's `__call__` calls it directly.

The operations of both kinds carry the number of the call in their name stacks.
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


class FunctionCall(NamedTuple):
    """A called function: one with a cursor at ``path`` (its name is empty), or an array function ``name`` (its path is
    empty)."""

    path: paths.Path
    name: str


@contextlib.contextmanager
def name_functions(note: Callable[[FunctionCall], str]) -> Iterator[None]:
    """Put the operations traced in the block into a named scope for each function that they are in.

    ``note`` is called at the start of each call and returns the name of its scope.
    """
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


def _named(frame: Any) -> FunctionCall | None:
    """The `FunctionCall` of a frame, or None if it is neither of the two kinds of functions."""
    code = frame.f_code
    names = code.co_varnames[: min(code.co_argcount, 2)]
    if code.co_filename.startswith(_ARRAYS):
        public = code.co_name[0] not in "_<" and names[:1] != ("self",) and not code.co_flags & inspect.CO_NESTED
        by = frame.f_back.f_code
        return FunctionCall((), code.co_name) if public and (_own(by) or by.co_name == "__call__") else None
    if not names or not _own(code):
        return None
    given = (frame.f_locals.get(name) for name in names)
    return next((FunctionCall(x._path, "") for x in given if isinstance(x, Vars)), None)


def _own(code: Any) -> bool:
    """True for code of a model, which is code outside Python, installed packages, and the rooms core and layers."""
    return not (installed(code.co_filename, "") or code.co_filename.startswith((_CORE, _LAYERS)))
