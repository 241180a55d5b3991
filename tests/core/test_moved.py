"""Public names that moved: each still works and says where it is."""

import importlib

import pytest

import sapwood as sw
from sapwood.core.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_works_and_says_the_new_one(old):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} now; the old name goes in") as said:
        found = getattr(importlib.import_module(module), name)
    assert said[0].filename == __file__
    room, _, new = MOVED[old].rpartition(".")
    assert found is getattr(importlib.import_module(room), new)


def test_losses_and_metrics_are_found_where_they_were():
    import sapwood.train.losses
    import sapwood.train.metrics

    assert sapwood.train.metrics is sw.metrics
    assert sw.train.losses is sapwood.train.losses is sw.losses
    assert importlib.import_module("sapwood.train.metrics.accumulators") is sw.metrics.accumulators  # and no copy


def test_what_keras_calls_a_loss_or_metric_is_answered():
    with pytest.raises(AttributeError, match=r"'sapwood.losses' has no attribute 'mse': here it is \"squared_error\""):
        _ = sw.losses.mse
    with pytest.raises(AttributeError, match=r"'sapwood.metrics' has no attribute 'mse': here it is"):
        _ = sw.metrics.mse


@pytest.mark.parametrize("module", ["core", "parallel", "recipes"])
def test_what_never_was_there_is_an_error(module):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = getattr(sw, module).nothing
