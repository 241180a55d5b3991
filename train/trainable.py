"""What trains, chosen by path pattern. What does not train has no gradient and no optimizer memory."""

from collections.abc import Callable
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.core.paths import leaves, matches, nearest, nest, overlay

Patterns = str | tuple[str, ...] | Callable[[str], bool]


def _fits(pattern: str, path: str) -> bool:
    """Whether a pattern names the path, or a scope around it."""
    pattern = pattern.removeprefix("!")
    return matches(pattern, path) or matches(f"{pattern}/**", path)


def _choose(patterns: Patterns, path: str) -> bool:
    if callable(patterns):
        return bool(patterns(path))
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    chosen = bool(patterns) and patterns[0].startswith("!")
    for pattern in patterns:
        if _fits(pattern, path):
            chosen = not pattern.startswith("!")
    return chosen


def split(params: dict, patterns: Patterns | None) -> tuple[dict, dict]:
    """``(trained, frozen)``: two nested dicts that `join` puts together again.

    A pattern names parameters or scopes: "head", "blocks/*/up/kernel", "**/bias"; "!stem" takes away, later patterns
    win, and a list that begins with "!" starts from everything. A function takes the path. None trains everything.

    >>> split({"stem": {"w": 1}, "head": {"w": 2, "b": 3}}, "head")
    ({'head': {'b': 3, 'w': 2}}, {'stem': {'w': 1}})
    >>> split({"stem": {"w": 1}, "head": {"w": 2, "b": 3}}, ("!stem", "!**/b"))[0]
    {'head': {'w': 2}}
    """
    if patterns is None:
        return params, {}
    found = [(path, leaf, _choose(patterns, "/".join(path))) for path, leaf in leaves(params)]
    return (
        nest((path, leaf) for path, leaf, chosen in found if chosen),
        nest((path, leaf) for path, leaf, chosen in found if not chosen),
    )


def join(trained: dict, frozen: dict) -> dict:
    """The whole tree again."""
    return overlay(frozen, trained) if frozen else trained


def check(params: Any, patterns: Patterns | None) -> None:
    """Raise `ConfigError` when a pattern matches nothing (naming the nearest paths), or nothing is left to train."""
    if patterns is None:
        return
    known = ["/".join(path) for path, _ in leaves(params)]
    scopes = sorted({"/".join(path[:k]) for path, _ in leaves(params) for k in range(1, len(path) + 1)})
    listed = () if callable(patterns) else (patterns,) if isinstance(patterns, str) else patterns
    for pattern in listed:
        if not any(_fits(pattern, path) for path in known):
            plain = pattern.removeprefix("!")
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ConfigError(f"trainable={pattern!r} matches no parameter{nearest(plain, scopes)} (there are {shown})")
    if not any(_choose(patterns, path) for path in known):
        raise ConfigError(f"trainable={patterns!r} leaves nothing to train among {len(known)} parameters")
