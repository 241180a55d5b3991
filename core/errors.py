"""Every exception Sapwood raises on purpose: one base class, and the builtin each kind also is."""


class SapwoodError(Exception):
    """Base of every error below; the command line prints these as one line and exits with code 2."""


class DeclarationError(SapwoodError, ValueError):
    """A variable's name, shape, dtype or declaration is wrong, missing or contradicts another."""


class InputError(SapwoodError, ValueError):
    """An array given to a layer or an array function has the wrong rank, size or dtype."""


class EffectError(SapwoodError, RuntimeError):
    """`put`, `rng`, `loss`, `sow` or `check` was used where its result could not be handed back."""


class CheckError(SapwoodError, ValueError):
    """A `v.check` found bad data on the device. `entry`: which entry of how many is the first that is bad, if known."""

    entry: tuple[int, int] | None = None


class ConfigError(SapwoodError, ValueError):
    """A hyper-parameter, dtype name, mesh description or option is not usable."""


class DataError(SapwoodError, ValueError):
    """The data is bad, or a data set is missing."""


class CheckpointError(SapwoodError, RuntimeError):
    """A checkpoint is damaged, missing, or belongs to another model."""
