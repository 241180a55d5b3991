"""Saving and loading: artifacts (a model in a directory), checkpoints (a run's state), digests of what was saved.

`sw.save` and `sw.load` are the same as here.
"""

from sapwood.saving.artifact import Artifact, load, save
from sapwood.saving.checkpoints import Checkpoints

__all__ = ["Artifact", "Checkpoints", "load", "save"]
