"""Paths of leaves in nested dicts: join, sort and match them; flatten, nest and overlay trees.

A path is a tuple of strings in code, and a string such as ``"blocks/3/up/kernel"`` wherever a person reads it.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Path = tuple[str, ...]


def join(path: Iterable[str]) -> str:
    """``("blocks", "3")`` as ``"blocks/3"``; the root is ``"(root)"``."""
    return "/".join(path) or "(root)"


def is_index(name: str) -> bool:
    """True if a name is a child's number in plain decimal form. ``"01"`` and ``"²"`` are words, not numbers.

    >>> is_index("10"), is_index("01"), is_index("²")
    (True, False, False)
    """
    return name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0")


def order(name: str) -> tuple[int, int, str]:
    """Sort key of a name. Numbers sort by value and come before words."""
    return (0, int(name), "") if is_index(name) else (1, 0, name)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested dicts with their paths, numbers sorted as numbers.

    >>> list(leaves({"b": {"10": 1, "9": 2}}))
    [(('b', '9'), 2), (('b', '10'), 1)]
    """
    if isinstance(tree, dict):
        for name in sorted(tree, key=order):
            yield from leaves(tree[name], (*path, name))
    else:
        yield path, tree


def nest(flat: Iterable[tuple[Path, Any]]) -> dict:
    """Nested dicts from pairs of path and leaf; the inverse of `leaves`.

    >>> nest([(("a", "w"), 1), (("a", "b"), 2)])
    {'a': {'w': 1, 'b': 2}}
    """
    tree: dict = {}
    for path, leaf in flat:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def subtree(tree: Any, path: Path) -> Any:
    """The subtree or leaf at ``path``; an empty dict if there is none."""
    for name in path:
        tree = tree.get(name, {}) if isinstance(tree, dict) else {}
    return tree


def overlay(base: dict, updates: dict) -> dict:
    """A new tree: ``base`` with the leaves of ``updates`` added or replaced. Both arguments stay unchanged."""
    merged = dict(base)
    for name, value in updates.items():
        old = merged.get(name)
        merged[name] = overlay(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return merged


@functools.lru_cache(maxsize=1024)
def _pattern(pattern: str) -> Callable[[str], Any]:
    parts = []
    for name in pattern.split("/"):
        parts.append(".*" if name == "**" else re.escape(name).replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
    text = "/".join(parts).replace("/.*", "(?:/.*)?").replace(".*/", "(?:.*/)?")
    return re.compile(text).fullmatch


def matches(pattern: str, path: str) -> bool:
    """True if a path matches a pattern. ``*`` matches within one name, ``?`` one character, ``**`` any number of names.

    >>> matches("blocks/*/up/kernel", "blocks/3/up/kernel"), matches("**/bias", "bias"), matches("*", "a/b")
    (True, True, False)
    """
    return _pattern(pattern)(path) is not None
