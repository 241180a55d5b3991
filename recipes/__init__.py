"""Built-in recipes, one per file. ``sapwood train NAME`` runs one; copy a file to start a recipe of your own.

Names that were moved to `sapwood.experiment` still work, with a `DeprecationWarning`.
"""

from typing import Any

from sapwood.core.moved import find_moved


def __getattr__(name: str) -> Any:
    if (found := find_moved(__name__, name)) is not None:
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__: list[str] = []
