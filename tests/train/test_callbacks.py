"""Callbacks: when they stop, and that their memory is all they need to go on."""

import json
import math
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood import ConfigError
from sapwood.layers import Dense
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import Trainer, TrainState, supervised
from sapwood.train.callbacks import EarlyStopping, Event, OnEpoch, ReduceOnPlateau, StopAt, TimeLimit, better


def event(epoch=1, epoch_end=True, begun=0.0, **row):
    return Event(epoch * 10, 100, epoch, epoch_end, row, None, begun)


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


PLATEAU = [1.0, 0.9, 0.895, 0.9, 0.9, 0.7, 0.71, 0.72, 0.73, math.nan, 0.74, 0.6, 0.61, 0.62]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [(PLATEAU, {"patience": 2, "factor": 0.5, "delta": 0.01},
      [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125, 0.0625]),
     ([1.0] * 9, {"patience": 1, "factor": 0.5, "cooldown": 2, "delta": 0.0},
      [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625]),
     (PLATEAU, {"patience": 1, "factor": 0.1, "cooldown": 2, "delta": 0.0, "least": 0.05},
      [1, 1, 1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]),
     (PLATEAU, {"patience": 2, "factor": 0.5, "mode": "max", "delta": 0.0},
      [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625, 0.03125, 0.03125, 0.015625, 0.015625])],
    ids=["delta", "cooldown", "cooldown and least", "max"],
)  # fmt: skip
def test_the_rate_falls_on_a_plateau_as_in_keras(values, options, expected):
    """What `keras.callbacks.ReduceLROnPlateau` of Keras 3.15.1 gave for the same values (its min_delta is delta)."""
    tx = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    state, memory, found = TrainState(0, {}, {}, tx.init(np.zeros(2)), None), {}, []
    for i, x in enumerate(values):
        memory = json.loads(json.dumps(memory))
        said = ReduceOnPlateau(**options)(Event(i, 99, i + 1, True, {"validation_loss": x}, state), memory)
        state = state if said is None else said
        found.append(float(state.opt_state[1].hyperparams["learning_rate"]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_rate_below_the_least_is_not_raised():
    state = TrainState(0, {}, {}, optax.inject_hyperparams(optax.sgd)(learning_rate=1e-4).init(np.zeros(2)), None)
    reduce, memory = ReduceOnPlateau(patience=1, least=1e-2), {}
    said = [reduce(Event(n, 9, n, True, {"validation_loss": 1.0}, state), memory) for n in (1, 2)]
    assert float(said[1].opt_state.hyperparams["learning_rate"]) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("tx", "message"),
    [(optax.adam(1e-3), r"holds none: make the optimizer by optax.inject_hyperparams\(optax.adam\)"),
     (optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 4)), "a schedule sets anew in each step")],
)  # fmt: skip
def test_a_rate_that_cannot_be_changed_says_so_at_the_first_epoch(tx, message):
    state = TrainState(0, {}, {}, tx.init(np.zeros(2)), None)
    with pytest.raises(ConfigError, match=message):
        ReduceOnPlateau()(Event(1, 9, 1, True, {"validation_loss": 1.0}, state), {})


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
    assert stops(EarlyStopping(patience=2), [math.nan] * 3) == [False, False, True]
    assert stops(EarlyStopping(patience=2), [math.nan, math.nan, 3, 4, 5]) == [False] * 4 + [True]


def test_a_metric_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'validation_los'.*did you mean 'validation_loss'"):
        EarlyStopping("validation_los")(event(validation_loss=1.0), {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([StopAt], r"StopAt is a class; a callback is StopAt\(\.\.\.\)"),
        (EarlyStopping(), r"takes a list of functions \(event, memory\), got EarlyStopping\("),
        (None, "takes a list of functions"),
        ([3], "a callback is a function \\(event, memory\\), got 3"),
    ],
)
def test_what_is_no_callback_is_refused_before_training(given, said):
    trainer = Trainer(supervised(lambda v, x: Dense(2)(v.out, x), inputs="x"), optax.sgd(0.1))
    data = {"x": np.ones((4, 3), "float32"), "label": np.zeros(4, "int32")}
    with pytest.raises(ConfigError, match=said):
        trainer.fit(data, epochs=1, batch_size=4, callbacks=given, progress=False)


def test_a_metric_that_is_an_array_is_no_number_to_watch():
    with pytest.raises(ConfigError, match=r"StopAt watches 'recall', which is an array of shape \(2,\)"):
        StopAt("recall", 0.5)(event(recall=np.ones(2)), {})


@pytest.mark.parametrize("make", [lambda: EarlyStopping(mode="smallest"), lambda: EarlyStopping(patience=0),
                                  lambda: StopAt("loss", 0, mode="up"), lambda: OnEpoch(print, every=0)])  # fmt: skip
def test_options_that_cannot_be(make):
    with pytest.raises(ConfigError):
        make()


def test_stop_at_a_target():
    assert StopAt("accuracy", 0.9)(event(accuracy=0.9), {})
    assert not StopAt("accuracy", 0.9)(event(accuracy=0.89), {})
    assert StopAt("loss", 0.1, "min")(event(epoch_end=False, loss=0.05), {})
    assert not StopAt("validation_loss", 0.1, "min")(event(epoch_end=False, loss=0.05), {})


def test_a_time_limit_counts_what_earlier_processes_spent(monkeypatch):
    now = [1002.0]  # two seconds of compiling
    monkeypatch.setattr("time.time", lambda: now[0])
    limit, memory = TimeLimit(10), {}
    assert not limit(event(begun=1000.0), memory)
    now[0] += 4
    assert not limit(event(begun=1000.0), memory)
    resumed = json.loads(json.dumps(memory))  # in another process, long after
    now[0] += 500
    assert not limit(event(begun=now[0] - 3), resumed)
    now[0] += 1
    assert limit(event(begun=now[0] - 4), resumed)


def test_a_time_limit_in_a_loop_of_ones_own(monkeypatch):
    own = Event(1, 9, 1, True, {}, None)
    now = [own.begun + 1]
    monkeypatch.setattr("time.time", lambda: now[0])
    limit, memory = TimeLimit(10), {}
    assert not limit(Event(1, 9, 1, True, {}, None), memory)
    now[0] += 9
    assert limit(Event(2, 9, 1, True, {}, None), memory)


def test_on_epoch_is_called_every_so_many_epochs():
    seen = []
    callback = OnEpoch(lambda e: seen.append(e.epoch), every=2)
    for epoch in range(1, 6):
        assert callback(event(epoch, epoch_end=False), {}) is None
        callback(event(epoch), {})
    assert seen == [2, 4]


PROGRAM = """
import sys, time as clock, types
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import numpy as np, optax
import importlib
from sapwood.train import Trainer, callbacks, supervised
loop = importlib.import_module("sapwood.train.loop.fit")

rates = {"first": (4.0, 0.0), "second": (0.0, 4.0)}  # seconds that a clock goes on between two looks at it
data = {"x": np.ones((11, 4), "float32"), "label": np.arange(11) % 3}
model = lambda v, x: x @ v.param("kernel", (4, 3), jax.nn.initializers.zeros)
options = supervised(model, inputs="x"), optax.sgd(0.1)
first, trainer = Trainer(*options).init(0, data), Trainer(*options, mesh="data=4")
for quick, seconds in rates.items():
    now = [1000.0]
    def time():
        now[0] += seconds[index]
        return now[0]
    callbacks.time = types.SimpleNamespace(time=time)
    loop.time = types.SimpleNamespace(time=lambda: 1000.0, perf_counter=clock.perf_counter)
    state, history = trainer.fit(data, state=first, steps=6, batch_size=4, log_every=1, validation=data,
                                 callbacks=[callbacks.TimeLimit(10)], progress=False)
    again, _ = trainer.fit(data, state=state, steps=7, batch_size=4, progress=False)
    assert again.step == 7
    print(quick, int(state.step), [row["step"] for row in history])
seen = []
mine = [lambda event, memory: seen.append(event.step) or event.step == 3] if index == 0 else []
state, _ = trainer.fit(data, state=first, steps=6, batch_size=4, log_every=1, callbacks=mine, progress=False)
print("alone", int(state.step))

def count(event, memory):
    memory["rows"] = memory.get("rows", 0) + 1
    seen.append(memory["rows"])

mine = [count] if index == 0 else []
options = {"batch_size": 4, "log_every": 1, "run": sys.argv[3], "callbacks": mine, "progress": False}
trainer.fit(data, epochs=1, **options)
state, _ = trainer.fit(data, epochs=2, resume=True, **options)
print("resumed", int(state.step), seen[-1] if mine else None)
"""


@pytest.mark.slow
def test_processes_whose_clocks_differ_stop_at_the_same_step(tmp_path):
    """The first process decides, also where it alone has callbacks. Where each decided for itself, one would wait for
    ever for the other's next step. Such a run can be resumed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "-c", PROGRAM, str(port), str(i), str(tmp_path)] for i in range(2)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        printed = [process.communicate(timeout=1200)[0].splitlines()[-4:] for process in running]
    finally:
        for process in running:
            process.kill()
    alike = ["first 3 [1, 2, 3]", "second 6 [1, 2, 3, 4, 5, 6]", "alone 3"]
    assert printed == [[*alike, "resumed 6 6"], [*alike, "resumed 6 None"]]


def test_the_best_is_what_was_measured_where_a_callback_changes_the_parameters(tmp_path):
    def to_zero(event, memory):
        if event.epoch == 1:
            return event.state.replace(params=jax.tree.map(jnp.zeros_like, event.state.params))
        return None

    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    trainer = Trainer(supervised(lambda v, x: Dense(1)(v.out, x), "squared_error", inputs="x"), optax.sgd(0.0))
    start = trainer.init(0, {"x": x, "label": x[:, :1]})
    kernel = np.asarray(start.params["out"]["kernel"])
    data = {"x": x, "label": x @ kernel}  # of no loss before the callback, of some after it
    options = {
        "state": start,
        "epochs": 3,
        "batch_size": 8,
        "best": "min:loss",
        "callbacks": [to_zero],
        "progress": False,
    }
    kept = trainer.fit(data, **options)
    assert [row["loss"] > 1e-3 for row in kept.history] == [False, True, True]
    assert np.array_equal(kept.state.params["out"]["kernel"], kernel)
    trainer.fit(data, **options, run=tmp_path)
    with Checkpoints(tmp_path / "checkpoints", best="min:loss") as checkpoints:
        assert checkpoints.best() in (2, 3)  # the first one's parameters are not those of its row
