"""Training: the `Trainer`, objectives, the pure step, the loop, callbacks, and the record of a run.

Losses, metrics and checkpoints are packages of their own: `sw.losses`, `sw.metrics` and `sapwood.saving`. `__all__`
lists the public names. `sapwood.train.losses` and `sapwood.train.metrics` are former names of two of these packages.
"""

import re
import sys
from typing import TYPE_CHECKING, Any

from sapwood import losses, metrics
from sapwood.core import migration_hints
from sapwood.core.moved import MOVED, find_moved
from sapwood.metrics import Last, Mean, Metric
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import callbacks
from sapwood.train.callbacks import Callback, EarlyStopping, Event, OnEpoch, ReduceOnPlateau, StopAt, TimeLimit
from sapwood.train.loop.fit import Result, fit
from sapwood.train.objectives.next_token import NextToken, next_token
from sapwood.train.objectives.supervised import Objective, Supervised, supervised
from sapwood.train.optimizers.blockwise import blockwise
from sapwood.train.optimizers.muon_axes import matrices
from sapwood.train.state.train_state import TrainState
from sapwood.train.step.checks import Flags
from sapwood.train.step.loss_scale import LossScale
from sapwood.train.trainer import Trainer

# Former names of the two packages and of their modules: `import sapwood.train.metrics` still works, and loads no copy.
for _name in [name for name in sys.modules if re.match(r"sapwood\.(losses|metrics)(\.|$)", name)]:
    sys.modules[_name.replace("sapwood.", "sapwood.train.", 1)] = sys.modules[_name]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if f"{__name__}.{name}" in MOVED:
            return find_moved(__name__, name)
        return migration_hints.missing("sapwood.train", migration_hints.TRAIN, name, __all__)


__all__ = [
    "Callback",
    "Checkpoints",
    "EarlyStopping",
    "Event",
    "Flags",
    "Last",
    "LossScale",
    "Mean",
    "Metric",
    "NextToken",
    "Objective",
    "OnEpoch",
    "ReduceOnPlateau",
    "Result",
    "StopAt",
    "Supervised",
    "TimeLimit",
    "TrainState",
    "Trainer",
    "blockwise",
    "callbacks",
    "fit",
    "losses",
    "matrices",
    "metrics",
    "next_token",
    "supervised",
]
