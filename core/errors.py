"""The exceptions that Sapwood raises. Each derives from `SapwoodError` and from the builtin class that fits it."""


class SapwoodError(Exception):
    """Base class of every error below. The command line prints it as one line and exits with code 2."""


class DeclarationError(SapwoodError, ValueError):
    """A variable's name, shape, dtype or declaration is wrong, missing or contradicts another."""


class InputError(SapwoodError, ValueError):
    """An array given to a layer or an array function has the wrong rank, size or dtype."""


class EffectError(SapwoodError, RuntimeError):
    """`put`, `rng`, `loss`, `sow` or `check` was used in a place that cannot return its result."""


class CheckError(SapwoodError, ValueError):
    """A `v.check` found bad data.

    `entry` is ``(index, size)``: the index of the first bad entry along the first dimension, and the size of that
    dimension. It is None if unknown.
    """

    entry: tuple[int, int] | None = None


class ConfigError(SapwoodError, ValueError):
    """A hyper-parameter, dtype name, mesh description or option is invalid."""


class DataError(SapwoodError, ValueError):
    """The data is bad, or a data set is missing."""


class CheckpointError(SapwoodError, RuntimeError):
    """A checkpoint is damaged, missing, or belongs to another model."""
