"""Callbacks: when they stop, and that their memory is all they need to go on."""

import json
import math

import pytest

from sapwood import ConfigError
from sapwood.train.callbacks import EarlyStopping, Event, OnEpoch, StopAt, TimeLimit, better


def event(epoch=1, epoch_end=True, **row):
    return Event(epoch * 10, 100, epoch, epoch_end, row, None)


def stops(callback, values, memory=None, name="validation_loss"):
    memory = {} if memory is None else memory
    return [bool(callback(event(i + 1, **{name: x}), memory)) for i, x in enumerate(values)]


def test_early_stopping_waits_for_its_patience():
    assert stops(EarlyStopping(patience=2), [3, 2, 2.5, 2.1]) == [False, False, False, True]
    assert stops(EarlyStopping(patience=2), [3, 2, 2.5, 1.9, 2]) == [False] * 5
    assert stops(EarlyStopping(patience=2), [math.nan, 0.5, 0.4, 0.3, 0.2]) == [False] * 5


def test_early_stopping_can_look_for_the_largest_and_for_a_margin():
    largest = EarlyStopping("accuracy", patience=1, mode="max", delta=0.1)
    assert stops(largest, [0.5, 0.7, 0.75], name="accuracy") == [False, False, True]


def test_early_stopping_goes_on_from_its_memory_as_json():
    callback, values = EarlyStopping(patience=2), [3, 2, 2.5, 2.1, 2.2]
    memory = {}
    first = stops(callback, values[:3], memory)
    again = json.loads(json.dumps(memory))
    assert first + stops(callback, values[3:], again) == stops(callback, values)


def test_early_stopping_looks_at_the_end_of_an_epoch_only():
    memory = {}
    assert not EarlyStopping(patience=1)(event(epoch_end=False, loss=1.0), memory)
    assert memory == {}


def test_nan_is_no_improvement():
    assert not better(math.nan, 1.0, "min")
    assert stops(EarlyStopping(patience=1), [1.0, math.nan]) == [False, True]


def test_a_metric_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'validation_los'.*did you mean 'validation_loss'"):
        EarlyStopping("validation_los")(event(validation_loss=1.0), {})


@pytest.mark.parametrize("make", [lambda: EarlyStopping(mode="smallest"), lambda: EarlyStopping(patience=0),
                                  lambda: StopAt("loss", 0, mode="up")])  # fmt: skip
def test_options_that_cannot_be(make):
    with pytest.raises(ConfigError):
        make()


def test_stop_at_a_target():
    assert StopAt("accuracy", 0.9)(event(accuracy=0.9), {})
    assert not StopAt("accuracy", 0.9)(event(accuracy=0.89), {})
    assert StopAt("loss", 0.1, "min")(event(epoch_end=False, loss=0.05), {})
    assert not StopAt("validation_loss", 0.1, "min")(event(epoch_end=False, loss=0.05), {})


def test_a_time_limit_counts_what_earlier_processes_spent(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    limit, memory = TimeLimit(10), {}
    assert not limit(event(), memory)
    now[0] += 6
    assert not limit(event(), memory)
    resumed = {**json.loads(json.dumps(memory)), "process": 0}  # another process, long after
    now[0] += 500
    assert not limit(event(), resumed)
    now[0] += 5
    assert limit(event(), resumed)


def test_on_epoch_is_called_every_so_many_epochs():
    seen = []
    callback = OnEpoch(lambda e: seen.append(e.epoch), every=2)
    for epoch in range(1, 6):
        assert callback(event(epoch, epoch_end=False), {}) is None
        callback(event(epoch), {})
    assert seen == [2, 4]
