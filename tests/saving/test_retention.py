"""Which checkpoints stay, as a pure rule: no disk is touched."""

import pytest

from sapwood import ConfigError
from sapwood.saving.best_metric import Goal
from sapwood.saving.checkpoints import Info
from sapwood.saving.retention import Retention

LOSSES = {10: 0.5, 20: 0.2, 30: 0.2, 40: float("nan")}
SAID = {step: Info(step, {}, {"loss": loss}, {}, "min:loss") for step, loss in LOSSES.items()}


def test_the_newest_and_the_best_stay():
    rule = Retention(1, Goal("min", "loss"))
    assert rule.kept([10, 20, 30, 40], SAID, newest=40) == {40, 20}
    assert Retention(2).kept([10, 20, 30, 40], SAID, newest=40) == {30, 40, 20}  # by what the newest was saved with
    assert Retention(2).kept([10, 20, 30, 40], {}, newest=40) == {30, 40}


def test_what_is_later_than_the_run_goes_unless_it_was_skipped_as_damaged():
    assert Retention(3).kept([10, 20, 30], {}, newest=10) == {10}
    assert Retention(3).kept([10, 20, 30], {}, newest=10, passed={20}) == {10, 20}
    assert Retention(3).kept([10, 20, 30], {}, newest=30, passed={20}) == {10, 30}


def test_the_ranking_leaves_out_what_has_no_number():
    assert Retention(1).ranked(SAID) == [20, 30, 10]
    assert Retention(1, Goal("max", "accuracy")).ranked(SAID) == []


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="keep=0: at least the newest checkpoint is kept"):
        Retention(0)
    with pytest.raises(ConfigError, match=r"best=\"min:los\", but the metrics are \['loss'\]; did you mean 'loss'"):
        Retention(1, Goal("min", "los")).check({"loss": 1.0})
