"""Ready experiments, one a file: what ``sapwood train NAME`` runs, and what to copy when you start your own."""

from sapwood.core.moved import find_moved


def __getattr__(name: str):
    if (found := find_moved(__name__, name)) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
