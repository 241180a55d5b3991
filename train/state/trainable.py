"""Trainable parameters, chosen by path pattern.

A parameter that is frozen has no gradient and no optimizer state. A scope of which nothing trains keeps its model
state. The first pattern that matches a path decides.
"""

from collections.abc import Callable
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest
from sapwood.core.paths import leaves, matches, nest, overlay

Patterns = str | tuple[str, ...] | Callable[[str], bool]


def as_patterns(patterns: Any) -> Any:
    """Convert patterns to the form that `Trainer` keeps, or raise `ConfigError` if they are none.

    >>> as_patterns(["!stem", "**"])
    ('!stem', '**')
    """
    if patterns is None or callable(patterns) or isinstance(patterns, str):
        return patterns
    if isinstance(patterns, tuple | list) and all(isinstance(pattern, str) for pattern in patterns):
        return tuple(patterns)
    raise ConfigError(
        f'Trainer(trainable={patterns!r}): a path pattern such as "head" or "!stem", several in a tuple of which the '
        "first that fits decides, or a function of the path is expected"
    )


def _fits(pattern: str, path: str) -> bool:
    """Return True if a pattern matches the path, or a scope around it."""
    pattern = pattern.removeprefix("!")
    return matches(pattern, path) or matches(f"{pattern}/**", path)


def _listed(patterns: Patterns) -> tuple[str, ...]:
    """Return the patterns as a tuple, which is empty for a function."""
    return () if callable(patterns) else (patterns,) if isinstance(patterns, str) else patterns


def _choose(patterns: Patterns, path: str) -> bool:
    """Return True if the parameter at a path trains."""
    if callable(patterns):
        return bool(patterns(path))
    listed = _listed(patterns)
    first = next((pattern for pattern in listed if _fits(pattern, path)), None)
    if first is None:
        return bool(listed) and all(pattern.startswith("!") for pattern in listed)
    return not first.startswith("!")


def split(params: dict, patterns: Patterns | None) -> tuple[dict, dict]:
    """Split parameters into ``(trained, frozen)``, two nested dicts that `join` merges again.

    A pattern names parameters or scopes: "head", "blocks/*/up/kernel", "**/bias". A pattern that starts with "!"
    freezes what it matches, as "!stem". The first pattern that matches a path decides, as in ``sw.load(match=)``. A
    path that no pattern matches trains if all patterns start with "!", and is frozen otherwise.

    Args:
        params: nested dict of parameters.
        patterns: a pattern, a tuple of patterns, or a function from a path to True or False; None trains everything.

    >>> split({"stem": {"w": 1}, "head": {"w": 2, "b": 3}}, "head")
    ({'head': {'b': 3, 'w': 2}}, {'stem': {'w': 1}})
    >>> split({"stem": {"w": 1}, "head": {"w": 2, "b": 3}}, ("!stem", "!**/b"))[0]
    {'head': {'w': 2}}
    >>> split({"stem": {"w": 1}, "head": {"w": 2, "b": 3}}, ("!**/b", "head"))[0]
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
    """Merge the two dicts that `split` returned."""
    return overlay(frozen, trained) if frozen else trained


def frozen_scopes(params: dict, patterns: Patterns | None) -> Any:
    """Return which scopes train nothing, in the form that a cursor keeps.

    It is True if the whole scope is frozen, False if nothing in it is, else pairs of a name and the same for that
    scope. A scope without parameters counts with the scope around it.

    >>> frozen_scopes({"stem": {"w": 1}, "head": {"norm": {"b": 2}, "w": 3}}, ("!stem", "!**/b"))
    (('head', (('norm', True),)), ('stem', True))
    """
    return False if patterns is None else _frozen(split(params, patterns)[0], params)


def _frozen(trained: Any, params: dict) -> Any:
    """Compute `frozen_scopes` for one scope, from its trained parameters and all its parameters."""
    if not trained:
        return True
    below = [(name, _frozen(trained.get(name), x)) for name, x in sorted(params.items()) if isinstance(x, dict) and x]
    return tuple((name, mark) for name, mark in below if mark) or False


def without_frozen(state: dict, marks: Any) -> dict:
    """Return the entries of a model state that lie in no frozen scope; ``marks`` is what `frozen_scopes` returned.

    >>> without_frozen({"stem": {"mean": 1}, "count": 2}, (("stem", True),))
    {'count': 2}
    """
    if not marks:
        return state
    below = {} if marks is True else dict(marks)
    return {
        name: without_frozen(x, below.get(name, False)) if isinstance(x, dict) else x
        for name, x in state.items()
        if marks is not True and below.get(name) is not True
    }


def check(params: Any, patterns: Patterns | None) -> None:
    """Raise `ConfigError` if a pattern has no effect, or if nothing is left to train.

    A pattern has no effect if it matches no parameter (the message has the nearest paths), or only parameters that an
    earlier pattern decides (the message has that pattern).
    """
    if patterns is None:
        return
    known = ["/".join(path) for path, _ in leaves(params)]
    scopes = sorted({"/".join(path[:k]) for path, _ in leaves(params) for k in range(1, len(path) + 1)})
    listed = _listed(patterns)
    for i, pattern in enumerate(listed):
        fitting = [path for path in known if _fits(pattern, path)]
        if not fitting:
            plain = pattern.removeprefix("!")
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ConfigError(f"trainable={pattern!r} matches no parameter{nearest(plain, scopes)} (there are {shown})")
        if all(any(_fits(earlier, path) for earlier in listed[:i]) for path in fitting):
            before = next(earlier for earlier in listed[:i] if _fits(earlier, fitting[0]))
            raise ConfigError(
                f"trainable={patterns!r}: {pattern!r} does nothing, because the first pattern that fits decides and "
                f"{before!r} comes before it; put {pattern!r} first, or leave it out"
            )
    if not any(_choose(patterns, path) for path in known):
        raise ConfigError(f"trainable={patterns!r} leaves nothing to train among {len(known)} parameters")
