"""Saving and loading: artifacts (a model in a directory), checkpoints (the state of a run) and digests of arrays.

`sw.save` and `sw.load` are the `save` and `load` of this package.
"""

from sapwood.saving.artifact import Artifact, load, save
from sapwood.saving.checkpoints import Checkpoints

__all__ = ["Artifact", "Checkpoints", "load", "save"]
