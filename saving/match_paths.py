"""Match paths of arrays in a file with paths in a model, to restore a part of one into a part of the other.

`match` applies the patterns of `sw.load(match=)`; `Report` lists what a partial restore did.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sapwood.core import messages
from sapwood.core.errors import ConfigError

_WILD = re.compile(r"\*\*|\*|\?")
_SPLIT = re.compile(f"({_WILD.pattern})")


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a partial restore.

    Args:
        loaded: maps each path of the model that was loaded to its path in the file.
        fresh: paths of the model that nothing was loaded into.
        unused: paths of the file that were not loaded.
    """

    loaded: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __repr__(self) -> str:
        moved = sum(there != here for here, there in self.loaded.items())
        lines = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.fresh)} arrays"]
        lines[0] += f", {moved} of them from another path" if moved else ""
        lines += [f"  {title}: {', '.join(_short(names))}" for title, names in self._rest() if names]
        return "\n".join(lines)

    def _rest(self) -> list[tuple[str, tuple[str, ...]]]:
        return [("fresh", self.fresh), ("unused", self.unused)]


def _short(names: tuple[str, ...]) -> list[str]:
    return [*names[:8], *([f"and {len(names) - 8} more"] if len(names) > 8 else [])]


def match(there: Iterable[str], here: Iterable[str], patterns: Mapping[str, str | None] | None) -> dict[str, str]:
    """Map each path of the model that is loaded to the path in the file that it is loaded from.

    The wildcards of a pattern are `*` (any characters within one name), `**` (any number of names, including zero) and
    `?` (one character). The text that a wildcard matches on the left replaces the same wildcard on the right, in order.
    The first pattern that fits a path decides, as in `Trainer(trainable=)`.

    Args:
        there: the paths in the file.
        here: the paths of the model.
        patterns: maps patterns of paths in the file to patterns of paths in the model. A value of None leaves the
            path out. `patterns=None` maps each path to itself.

    Raises:
        ConfigError: a pattern fits no path of the file, or only paths that an earlier pattern decides; it leads to no
            path of the model; its two sides have different wildcards; or it maps two arrays to one path.

    >>> match(["backbone/0/w", "head/w"], ["encoder/0/w", "head/w"], {"backbone/**": "encoder/**"})
    {'encoder/0/w': 'backbone/0/w'}
    """
    there, here = list(there), set(here)
    table = [(left, right, _compile(left, right)) for left, right in (patterns or {"**": "**"}).items()]
    found: dict[str, str] = {}
    led: dict[str, list[str]] = {left: [] for left, _, _ in table}
    for path in there:
        for left, right, regex in table:
            fit = regex.fullmatch(path)
            if fit is None:
                continue
            target = None if right is None else _fill(right, fit.groups())
            led[left].append(path if target is None else target)
            if target in found:
                raise ConfigError(f"match leads both {found[target]} and {path} to {target}")
            if target in here:
                found[target] = path
            break
    _check(table, led, there, here, patterns)
    return found


def _check(table, led, there, here, patterns) -> None:
    """Raise ConfigError for a pattern that has no effect."""
    for left, right, regex in table if patterns else []:
        if not any(regex.fullmatch(path) for path in there):
            near = messages.nearest(left, _scopes(there))
            raise ConfigError(f"match: nothing in the file fits {left!r}{near}; it has {', '.join(_tops(there))}")
        if not led[left]:
            path = next(path for path in there if regex.fullmatch(path))
            before = next(earlier for earlier, _, fits in table if fits.fullmatch(path))
            raise ConfigError(
                f"match: {left!r} does nothing, because the first pattern that fits decides and {before!r} comes "
                f"before it; put {left!r} first, or leave it out"
            )
        if right is not None and led[left] and not any(target in here for target in led[left]):
            near = messages.nearest(right, _scopes(here))
            raise ConfigError(
                f"match: {left!r} leads to {right!r}, which the model has not{near}; it has {', '.join(_tops(here))}"
            )


def _compile(left: str, right: str | None) -> re.Pattern:
    if right is not None and _WILD.findall(right) != _WILD.findall(left):
        raise ConfigError(f"match: {left!r} and {right!r} must have the same wildcards in the same order")
    parts = []
    for name in left.split("/"):
        wild = {"**": "([^/]*)", "*": "([^/]*)", "?": "([^/])"}
        parts.append("(.*)" if name == "**" else "".join(wild.get(x, re.escape(x)) for x in _SPLIT.split(name)))
    # As in `paths.matches`: if `**` matches zero names, its slash is dropped too.
    return re.compile("/".join(parts).replace("/(.*)", "(?:/(.*))?").replace("(.*)/", "(?:(.*)/)?"))


def _fill(right: str, groups: tuple[str | None, ...]) -> str:
    taken = iter(groups)
    names = [_WILD.sub(lambda _: next(taken) or "", name) for name in right.split("/")]
    return "/".join(name for name in names if name)


def _tops(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] + ("/**" if "/" in name else "") for name in sorted(names)))[:10]


def _scopes(names: Iterable[str]) -> list[str]:
    scopes = {"/".join(name.split("/")[:n]) for name in names for n in range(1, name.count("/") + 1)}
    return sorted({f"{scope}/**" for scope in scopes} | set(names))
