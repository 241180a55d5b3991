"""Trust: from which packages code may be imported because a file names it. Sapwood trusts no file by itself."""

import sys
from collections.abc import Sequence
from types import ModuleType

from sapwood.core.errors import ConfigError

Trust = str | ModuleType | Sequence[str | ModuleType]
"""What `trust=` takes: packages or modules, by name or as they are imported."""


def trusted(trust: Trust) -> tuple[str, ...]:
    """The names of what the caller trusts. ConfigError for what is no name of a package.

    >>> trusted("my_project"), trusted(())
    (('my_project',), ())
    """
    given = (trust,) if isinstance(trust, str | ModuleType) else tuple(trust)
    names = tuple(x.__name__ if isinstance(x, ModuleType) else x for x in given)
    for name in names:
        if not is_dotted(name):
            raise ConfigError(f"trust={name!r}: the name of a package or a module is expected, such as 'my_project'")
    return names


def covers(names: Sequence[str], module: str) -> bool:
    """Whether a module is one of these packages, or inside one.

    >>> covers(("my_project",), "my_project.models"), covers(("my_project",), "my_projects")
    (True, False)
    """
    return any(module == name or module.startswith(f"{name}.") for name in names)


def refusal(what: str, module: str, call: str) -> str:
    """Why the module of `what`, which a file names, is not imported, and what to write in `call` if it is trusted."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or not is_dotted(module):
        return f"{what} is of no package that a file may name; it is not imported"
    return (
        f"{what} is of another package, and nothing is imported from {top!r} because a file says so; if you trust that "
        f"package, say so: {call}(..., trust={top!r})"
    )


def is_dotted(name: object) -> bool:
    """Whether this is the name of a module as `import` takes it.

    >>> is_dotted("a.b"), is_dotted("a..b"), is_dotted("a.b:c")
    (True, False, False)
    """
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
