"""Ctrl-C and SIGTERM while a run trains: what is saved and handed back, what goes on as if nothing had happened."""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood import CheckError, ConfigError
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import Trainer, supervised
from sapwood.train.loop import interrupts
from sapwood.train.loop.dispatch import Sender
from sapwood.train.loop.interrupts import Interrupts
from sapwood.train.record.jsonl import read_rows

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(22, 4)).astype("float32"), "label": (np.arange(22) % 3).astype("int32")}
TRAINER = Trainer(supervised(lambda v, x: x @ v.param("w", (4, 3), jax.nn.initializers.normal()), inputs="x"),
                  optax.adam(0.1))  # fmt: skip
FIT = {"epochs": 4, "batch_size": 4, "progress": False, "steps_per_call": 1, "validation": DATA, "log_every": 4}


@pytest.fixture
def after(monkeypatch):
    """Have something happen as soon as so many steps of a `fit` are sent."""

    def arrange(step, happens):
        with monkeypatch.context() as patch:
            count = [0]

            def send(self, state, batch, size, real=Sender.send):
                found = real(self, state, batch, size)
                count[0] += size
                if count[0] == step:
                    happens()
                return found

            patch.setattr(Sender, "send", send)
            return TRAINER.fit(DATA, **FIT, **arrange.options)

    arrange.options = {}
    return arrange


def raises(*numbers):
    return lambda: [signal.raise_signal(number) for number in numbers]


def lasting(rows):
    return [{name: x for name, x in row.items() if name != "steps_per_second"} for row in rows]


@pytest.fixture(scope="module")
def unbroken():
    return TRAINER.fit(DATA, **FIT)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    usual = dict.fromkeys(interrupts.NAMES, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}  # `pytest &` ignores Ctrl-C
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == usual


def test_ctrl_c_saves_and_hands_back(after, unbroken, tmp_path, capsys):
    step = 5
    after.options = {"run": tmp_path}
    state, history = result = after(step, raises(signal.SIGINT))
    assert (result.stopped, int(state.step)) == ("Ctrl-C", step)
    assert lasting(history) == lasting(unbroken.history[: len(history)])
    assert Checkpoints(tmp_path / "checkpoints").steps() == [step]
    err = capsys.readouterr().err
    assert "ending after this step; again to stop at once" in err
    assert f"stopped by Ctrl-C after step {step} of 24, which is saved in {tmp_path}; --resume" in err


@pytest.mark.parametrize("stops", [(3, 2, 1), (8,)])  # twice in the middle of a row, and where one ends
def test_a_stopped_run_goes_on_bit_for_bit(after, unbroken, tmp_path, stops):
    for steps in stops:
        after.options = {"run": tmp_path, "resume": True}
        assert after(steps, raises(signal.SIGINT)).stopped == "Ctrl-C"
    assert Checkpoints(tmp_path / "checkpoints").latest() == sum(stops)
    state, history = TRAINER.fit(DATA, run=tmp_path, resume=True, **FIT)
    assert equal((state.params, state.opt_state), (unbroken.state.params, unbroken.state.opt_state))
    assert lasting(history) == lasting(read_rows(tmp_path / "metrics.jsonl")) == lasting(unbroken.history)


def test_without_a_run_the_state_so_far_is_handed_back(after, capsys):
    result = after(5, raises(signal.SIGINT))
    assert (int(result.state.step), result.stopped) == (5, "Ctrl-C")
    assert "stopped by Ctrl-C after step 5 of 24; the state so far is handed back" in capsys.readouterr().err
    assert TRAINER.fit(DATA, state=result.state, **FIT).stopped is None


def test_ctrl_c_twice_stops_at_once(after, tmp_path):
    after.options = {"run": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        after(5, raises(signal.SIGINT, signal.SIGINT))
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


@pytest.mark.parametrize("number", [n for n in interrupts.NAMES if n != signal.SIGINT])
def test_what_ends_a_process_saves_first(after, tmp_path, number):
    after.options = {"run": tmp_path}
    with pytest.raises(SystemExit) as end:
        after(5, raises(number))
    assert end.value.code == 128 + number
    assert Checkpoints(tmp_path / "checkpoints").steps() == [5]


def test_the_handler_of_another_gets_the_signal_when_all_is_saved(after, tmp_path):
    seen = []
    mine = lambda number, frame: seen.append((number, Checkpoints(tmp_path / "checkpoints").steps()))  # noqa: E731
    before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        after.options = {"run": tmp_path}
        assert after(5, raises(signal.SIGTERM)).stopped == "SIGTERM"
        after.options = {"run": tmp_path, "resume": True}
        assert after(2, raises(signal.SIGINT)).stopped == "Ctrl-C"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [(signal.SIGTERM, [5]), (signal.SIGINT, [5, 7])]


def test_what_is_ignored_stays_ignored(after):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert after(5, raises(signal.SIGINT)).stopped is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_as_ever(unbroken):
    found = []
    thread = threading.Thread(target=lambda: found.append(TRAINER.fit(DATA, **FIT)))
    thread.start()
    thread.join()
    assert equal(found[0].state.params, unbroken.state.params)


def test_a_save_that_takes_longer_than_the_grace_is_given_up(monkeypatch, capsys):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(interrupts.os, "_exit", lambda code: (codes.append(code), ended.set()))
    with Interrupts(0.0):
        signal.raise_signal(signal.SIGTERM)
        assert ended.wait(60)
    assert codes == [143]
    assert "took longer than the 0 s of grace" in capsys.readouterr().err
    with Interrupts(3600.0) as one:
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        one.hand_on()
    assert one._timer is not None
    one._timer.join(60)  # it was called off
    assert codes == [143]


@pytest.mark.parametrize("grace", [-1, float("inf"), float("nan")])
def test_a_grace_that_cannot_be(grace):
    with pytest.raises(ConfigError, match="seconds from 0 on are expected"):
        TRAINER.fit(DATA, grace=grace, **FIT)


@pytest.mark.slow
def test_a_failed_check_in_the_row_that_is_cut_is_found(tmp_path):
    model = lambda v, x: jnp.log(-jnp.abs(x @ v.param("w", (4, 3), jax.nn.initializers.normal())))  # noqa: E731
    trainer = Trainer(supervised(model, inputs="x"), optax.adam(0.1))
    stop = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        real = Sender.send
        patch.setattr(Sender, "send", lambda self, *args: (real(self, *args), stop())[0])
        with pytest.raises(CheckError, match="the loss is not finite"):
            trainer.fit(DATA, run=tmp_path, **{**FIT, "validation": None})
    assert Checkpoints(tmp_path / "checkpoints").steps() == []
