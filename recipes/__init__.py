"""Built-in recipes, one per file. ``sapwood train NAME`` runs one; copy a file to start a recipe of your own.

Names that were moved to `sapwood.experiment` still work, with a `DeprecationWarning`.
"""

from typing import Any

from sapwood.core.moved import find_moved


def __getattr__(name: str) -> Any:
    return find_moved(__name__, name)


__all__: list[str] = []
