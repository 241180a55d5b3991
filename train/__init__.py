"""Objectives, the training step and loop, metrics, checkpoints, callbacks."""

from typing import TYPE_CHECKING

from sapwood.core import foreign
from sapwood.train import callbacks, losses, metrics
from sapwood.train.callbacks import Callback, EarlyStopping, Event, OnEpoch, ReduceOnPlateau, StopAt, TimeLimit
from sapwood.train.checkpoints import Checkpoints
from sapwood.train.checks import Flags
from sapwood.train.layout import layout
from sapwood.train.loop import Result, fit
from sapwood.train.metrics import Last, Mean, Metric
from sapwood.train.muon import matrices
from sapwood.train.next_token import NextToken, next_token
from sapwood.train.objective import Objective, Supervised, supervised
from sapwood.train.per_block import blockwise
from sapwood.train.profiling import Profile, profile
from sapwood.train.scaling import LossScale
from sapwood.train.state import TrainState
from sapwood.train.trainer import Trainer

if not TYPE_CHECKING:

    def __getattr__(name: str):
        return foreign.missing("sapwood.train", foreign.TRAIN, name, __all__)


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
    "Profile",
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
    "layout",
    "losses",
    "matrices",
    "metrics",
    "next_token",
    "profile",
    "supervised",
]
