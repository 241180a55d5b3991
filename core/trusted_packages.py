"""Trust: the packages from which code may be imported because a file names it. No file is trusted by itself.

The caller lists packages in `trust=`. `trusted` checks that list, `is_in_packages` applies it, and `refusal` is the
message if a package is not in it. `saving.model_reference` has the packages of Sapwood and JAX that models may always
come from.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

from sapwood.core.errors import ConfigError

Trust = str | ModuleType | Sequence[str | ModuleType]
"""The type of `trust=`: packages or modules, by name or as module objects; one or several."""


def trusted(trust: Trust) -> tuple[str, ...]:
    """The names of the packages and modules in ``trust``. Raises `ConfigError` for text that is no module name.

    >>> trusted("my_project"), trusted(())
    (('my_project',), ())
    """
    given = (trust,) if isinstance(trust, str | ModuleType) else tuple(trust)
    names = tuple(x.__name__ if isinstance(x, ModuleType) else x for x in given)
    for name in names:
        if not is_dotted(name):
            raise ConfigError(f"trust={name!r}: the name of a package or a module is expected, such as 'my_project'")
    return names


def is_in_packages(names: Sequence[str], module: str) -> bool:
    """True if a module is one of these packages or inside one.

    >>> is_in_packages(("my_project",), "my_project.models"), is_in_packages(("my_project",), "my_projects")
    (True, False)
    """
    return any(module == name or module.startswith(f"{name}.") for name in names)


def refusal(what: str, module: str, call: str) -> str:
    """The message that `what`, from a `module` that a file names, is not imported, and why.

    If the module can be trusted, the message says to pass `trust=` to `call`.
    """
    top = module.split(".")[0]
    if top in sys.stdlib_module_names or not is_dotted(module):
        return f"{what} is of no package that a file may name; it is not imported"
    return (
        f"{what} is of another package, and nothing is imported from {top!r} because a file says so; if you trust that "
        f"package, say so: {call}(..., trust={top!r})"
    )


def is_dotted(name: object) -> bool:
    """True if ``name`` is a module name that `import` accepts.

    >>> is_dotted("a.b"), is_dotted("a..b"), is_dotted("a.b:c")
    (True, False, False)
    """
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
