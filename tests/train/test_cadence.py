"""When a run logs and saves."""

import pytest

from sapwood import ConfigError
from sapwood.train.loop.cadence import Cadence, cadence_of

ASK = {"epochs": 3, "steps": None, "log_every": None, "checkpoint_every": None, "best": False}


def test_rows_close_at_epochs_intervals_checkpoints_and_the_end():
    cadence = Cadence(steps=12, steps_per_epoch=5, log_every=2, checkpoint_every=8)
    assert [s for s in range(1, 13) if cadence.closes_row(s)] == [2, 4, 5, 7, 8, 9, 10, 12]
    assert [s for s in range(1, 13) if cadence.ends_epoch(s)] == [5, 10, 12]
    assert [s for s in range(1, 13) if cadence.saves(s)] == [8, 12]
    assert [cadence.epoch(s) for s in (1, 5, 6, 12)] == [1, 1, 2, 3]


def test_the_defaults_follow_the_length_of_an_epoch():
    assert cadence_of(45, **ASK) == Cadence(135, 45, 45, 225)
    assert cadence_of(1000, **ASK) == Cadence(3000, 1000, 100, 1000)
    assert cadence_of(45, **{**ASK, "best": True}).checkpoint_every == 45


def test_the_best_is_chosen_among_the_ends_of_all_epochs():
    cadence = cadence_of(45, **{**ASK, "best": True, "checkpoint_every": 100})
    assert [s for s in range(1, 136) if cadence.saves(s)] == [45, 90, 100, 135]
    assert all(cadence.closes_row(s) for s in (45, 90, 100, 135))
    assert [cadence.row_end(s) for s in (0, 45, 90, 100)] == [45, 90, 100, 135]


@pytest.mark.parametrize("change", [{"steps": 5}, {"epochs": None}, {"epochs": 0}, {"epochs": 1.3}, {"log_every": 0}])
def test_options_that_cannot_be(change):
    with pytest.raises(ConfigError, match="fit"):
        cadence_of(10, **{**ASK, **change})
