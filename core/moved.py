"""Public names that live elsewhere now. The old ones still work, with a `DeprecationWarning` that says the new one."""

import importlib
import warnings
from typing import Any

MOVED = {
    **{f"sapwood.core.{name}": f"sapwood.{name}" for name in (
        "Layer", "Param", "Policy", "Spec", "Updates", "Vars", "frozen", "params", "pure", "stack", "state",
        "unstack")},
    "sapwood.core.Stacked": "sapwood.core.param.Stacked",
    "sapwood.parallel.Activation": "sapwood.inspection.Activation",
    "sapwood.parallel.activations": "sapwood.inspection.activations",
    "sapwood.parallel.show": "sapwood.inspection.show",
    "sapwood.recipes.BUILT_IN": "sapwood.experiment.BUILT_IN",
    "sapwood.recipes.Recipe": "sapwood.experiment.Recipe",
    "sapwood.recipes.find": "sapwood.experiment.find",
    "sapwood.train.Profile": "sapwood.inspection.Profile",
    "sapwood.train.layout": "sapwood.inspection.layout",
    "sapwood.train.profile": "sapwood.inspection.profile",
}  # fmt: skip


def find_moved(module: str, name: str) -> Any:
    """The object that `module.name` names now. Raises AttributeError if that name has not moved.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     found = find_moved("sapwood.train", "profile")
    >>> str(said[0].message)
    'sapwood.train.profile is sapwood.inspection.profile now; the old name goes in 0.4'
    """
    new = MOVED.get(f"{module}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is {new} now; the old name goes in 0.4", DeprecationWarning, stacklevel=3)
    room, _, attribute = new.rpartition(".")
    return getattr(importlib.import_module(room), attribute)
