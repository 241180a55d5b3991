"""The kernel: cursors, declarations, initialization, random keys, running a model.

It depends on JAX only, not on meshes or training. Its public names are those of `sapwood` itself (`sw.init`,
`sw.apply`, `sw.Vars`); other rooms import its files by name.
"""

from typing import Any

from sapwood.core.moved import find_moved


def __getattr__(name: str) -> Any:
    return find_moved(__name__, name)


__all__: list[str] = []
