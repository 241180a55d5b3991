"""Several steps in one dispatch: the same bits, rows and errors as one at a time, and used only where that holds."""

import types
import warnings
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import CheckError, ConfigError
from sapwood import layers as L
from sapwood.saving.digest import tree_digest
from sapwood.train import Checkpoints, EarlyStopping, Last, Metric, StopAt, Trainer, supervised
from sapwood.train.loop import blocks as loop_blocks
from sapwood.train.loop import dispatch, programs
from sapwood.train.loop.cadence import Cadence

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(90, 6)).astype("float32"), "label": (np.arange(90) % 3).astype("int32")}
PICTURES = {"x": RNG.normal(size=(40, 4, 4, 1)).astype("float32"), "label": (np.arange(40) % 3).astype("int32")}


def linear(v, x):
    return L.Dense(3)(v.head, x)


def mlp(v, x):
    return L.Dense(3)(v.head, jax.nn.relu(L.Dense(16)(v.hidden, x)))


def dropout(v, x):
    return L.Dense(3)(v.head, L.Dropout(0.3)(v.drop, jax.nn.relu(L.Dense(16)(v.hidden, x))))


def convolution(v, x):
    x = jax.nn.relu(L.BatchNorm()(v.norm, L.Conv(2, (3, 3))(v.conv, x)))
    return L.Dense(3)(v.head, x.mean((1, 2)))


def made(model=mlp, optimizer=None, metrics=("accuracy",), **options):
    return Trainer(supervised(model, metrics=metrics, inputs="x"), optimizer or optax.adam(0.01), **options)


SGD = optax.sgd(0.01)


def fit(trainer, steps_per_call, data=DATA, **options):
    length = {} if "epochs" in options else {"steps": 30}
    given = {"batch_size": 4, "log_every": 9, "progress": False, **length, **options}
    return trainer.fit(data, **given, steps_per_call=steps_per_call)


def lasting(rows):
    """The rows without what depends on the clock."""
    return [{name: x for name, x in row.items() if name != "steps_per_second"} for row in rows]


def assert_same(one, other):
    assert tree_digest(one.state) == tree_digest(other.state)
    assert lasting(one.history) == lasting(other.history)


@pytest.fixture
def blocks(monkeypatch):
    """The sizes of the blocks that were sent and kept, after their first was held to single steps."""
    sent = []
    send = dispatch.Sender.send

    def watched(self, state, batch, size):
        if size > 1 and self.held:
            sent.append(size)
        return send(self, state, batch, size)

    monkeypatch.setattr(dispatch.Sender, "send", watched)
    return sent


# ---- the same bits --------------------------------------------------------------------------------------------------

RUNS = {
    "adam": (lambda: made(), DATA),
    "convolution and batch norm": (lambda: made(convolution, SGD), PICTURES),
    "dropout in micro-batches": (lambda: made(dropout, SGD, accumulate=2), DATA),
    "a part trains, with a running mean": (lambda: made(trainable="head", ema=0.9, clip=1.0), DATA),
    "float16": (lambda: made(linear, SGD, policy="float16"), DATA),
    "a mesh": (lambda: made(dropout, SGD, mesh=sw.mesh("data=2,fsdp=2", devices=jax.devices()[:4])), DATA),
}
# As users compile them: a loop, and steps one after the other.
OPTIMISED = {"adam", "convolution and batch norm"}


@pytest.mark.costs("two runs, one of them with a block beside its step, some compiled anew")
@pytest.mark.parametrize(
    "run",
    [
        *(pytest.param(run, marks=pytest.mark.fresh_compile) if run in OPTIMISED else run for run in RUNS),
        *(
            pytest.param(run, marks=[pytest.mark.fresh_compile, pytest.mark.slow], id=f"{run}, optimised")
            for run in RUNS
            if run not in OPTIMISED
        ),
    ],
)
def test_blocks_give_the_bits_and_rows_of_single_steps(run, blocks):
    make, data = RUNS[run]
    size = 3 if data is PICTURES else 8  # a convolution is unrolled on a CPU
    one = fit(make(), 1, data)
    assert not blocks
    assert_same(fit(make(), size, data), one)
    assert set(blocks) == {size}


def test_a_block_that_divides_no_row(blocks):
    one = fit(made(linear, SGD), 1, validation=DATA, epochs=2)
    assert_same(fit(made(linear, SGD), 5, validation=DATA, epochs=2), one)
    assert set(blocks) == {5}


class Largest(Metric):
    """Merges otherwise than by adding."""

    value: jax.Array

    def merge(self, other):
        return Largest(np.maximum(self.value, other.value))

    def compute(self):
        return self.value


def test_metrics_of_every_kind_merge_alike():
    def largest(outputs, target, weight):
        return Largest(jnp.max(outputs))

    def newest(outputs, target, weight):
        return Last(outputs[0, 0])

    def trainer():
        return made(optimizer=optax.inject_hyperparams(optax.sgd)(0.1), metrics=(largest, newest, "confusion"))

    one, several = fit(trainer(), 1), fit(trainer(), 8)
    for a, b in zip(lasting(one.history), lasting(several.history), strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert {"largest", "newest", "confusion", "learning_rate"} <= one.history[0].keys()


# ---- what happens between blocks ------------------------------------------------------------------------------------


def test_a_failed_check_inside_a_block_names_the_same_step_and_entry():
    def error(steps_per_call):
        data = {**DATA, "label": np.where(np.arange(90) == 77, 5, DATA["label"])}
        with pytest.raises(CheckError) as caught:
            fit(made(linear, SGD), steps_per_call, data)
        return str(caught.value), caught.value.__notes__

    stream = np.random.RandomState([0, 0]).permutation(90)
    step, entry = divmod(int(np.flatnonzero(stream == 77)[0]), 4)
    message, notes = error(8)
    assert (message, notes) == error(1)
    assert f"entry {entry}" in message
    assert notes == [f"in step {step + 1} (epoch 1): entry {entry} is example 77"]


def test_callbacks_stop_a_run_at_the_same_step(tmp_path):
    def run(steps_per_call):
        stop = StopAt("loss", 1.0, "min"), EarlyStopping("loss", patience=9)
        return fit(made(optimizer=optax.adam(0.05)), steps_per_call, epochs=9, log_every=4, callbacks=stop)

    one, several = run(1), run(4)
    assert_same(several, one)
    assert int(one.state.step) < 9 * 23


def test_the_best_checkpoint_is_the_same(tmp_path):
    for size in (1, 5):
        options = {
            "epochs": 3,
            "validation": DATA,
            "best": "min:validation_loss",
            "keep": 1,
            "run": tmp_path / str(size),
        }
        fit(made(linear, optax.sgd(1.0)), size, **options)
    best = [Checkpoints(tmp_path / size / "checkpoints", best="min:validation_loss").best() for size in ("1", "5")]
    assert best[0] == best[1] is not None


@pytest.mark.costs("three runs, two of them with a block beside their step, compiled anew")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(8, 3, marks=pytest.mark.fresh_compile),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 8), (8, 1))),
    ],
)
def test_a_run_goes_on_with_other_blocks(tmp_path, first, then):
    class Killed(BaseException):
        pass

    def kill(event, memory):
        if event.step == 18 and not resume:
            raise Killed

    resume = False
    options = {"run": tmp_path, "checkpoint_every": 12, "callbacks": [kill], "resume": True}
    with pytest.raises(Killed):
        fit(made(dropout), first, **options)
    resume = True
    assert_same(fit(made(dropout), then, **options), fit(made(dropout), 1, checkpoint_every=12))


def test_without_jit_steps_go_one_at_a_time(blocks):
    """Every operation by itself, so with the least model that there is."""
    one = fit(made(linear, SGD, (), jit=False), 2, steps=2)
    assert not blocks
    assert int(one.state.step) == 2


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The clock that "auto" looks at: it goes on by what a call is said to take, a step or a block, and by that alone.

    A block is compiled on the spot, in no time or in the seconds that are said.
    """
    takes = types.SimpleNamespace(step=0.001, block=0.001, compiling=0.0, now=0.0)
    call, compiled = dispatch.Sender._call, programs.Programs.compile

    def timed(self, program, *args):
        takes.now += takes.step if program is self.programs.step else takes.block
        return call(self, program, *args)

    class Pool:
        def __init__(self, *_, **__):
            pass

        def submit(self, function, *args):
            done = Future()
            done.set_result(function(*args))
            return done

        def shutdown(self, wait):
            pass

    monkeypatch.setattr(dispatch, "time", types.SimpleNamespace(perf_counter=lambda: takes.now))
    monkeypatch.setattr(dispatch.Sender, "_call", timed)
    monkeypatch.setattr(dispatch, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(programs.Programs, "compile", lambda *args: (compiled(*args)[0], takes.compiling))
    return takes


def test_auto_switches_where_that_is_faster(tmp_path, blocks, clock):
    clock.step, clock.block = 0.003, 0.010
    trainer = made(optimizer=SGD)
    options = {"steps": 600, "log_every": 100, "checkpoint_every": 300}
    several = fit(trainer, "auto", run=tmp_path, **options)
    chosen = Checkpoints(tmp_path / "checkpoints").info(600).info["steps_per_call"]
    assert chosen > 1
    assert len(blocks) > 10
    assert_same(several, fit(trainer, 1, **options))
    held = len(blocks)
    again = fit(trainer, "auto", run=tmp_path, resume=True, **{**options, "steps": 700})
    assert set(blocks[held:]) == {chosen}  # as before, from the first row on
    assert_same(again, fit(trainer, 1, **{**options, "steps": 700}))


def forbidden(*_):
    pytest.fail("compiled a block")


def test_auto_leaves_a_short_run_alone(blocks, clock, monkeypatch):
    clock.compiling = 0.1
    monkeypatch.setattr(loop_blocks.StepPrograms, "compile", forbidden)
    fit(made(linear, SGD), "auto", steps=200)
    assert not blocks


def test_auto_leaves_long_steps_alone(blocks, clock, monkeypatch):
    clock.step = 1.1 * dispatch.SHORT
    monkeypatch.setattr(loop_blocks.StepPrograms, "compile", forbidden)
    fit(made(linear, SGD), "auto", steps=200)
    assert not blocks


@pytest.mark.parametrize("block", [0.050, 0.0228])  # 23 steps of a millisecond, less a hundredth
def test_auto_goes_back_where_blocks_are_no_faster_by_a_fiftieth(tmp_path, blocks, clock, block):
    clock.block = block
    fit(made(linear, SGD), "auto", log_every=30, steps=600, checkpoint_every=600, run=tmp_path)
    assert blocks
    assert Checkpoints(tmp_path / "checkpoints").info(600).info["steps_per_call"] == 1


def counted(v, x):
    """A model that is not a function of its inputs alone: no two runs of it agree."""

    def count(shape):
        calls[0] += 1
        return np.float32(calls[0] * 1e-3)

    calls = counted.calls
    return mlp(v, x) * jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x.shape[0])


def test_what_does_not_agree_goes_one_at_a_time(tmp_path, blocks):
    counted.calls = [0]
    with pytest.warns(UserWarning, match="does not give the bits of single steps here; they go one at a time"):
        state, history = fit(made(counted), 8, run=tmp_path)
    assert not blocks
    assert int(state.step) == 30
    assert [row["step"] for row in history] == [9, 18, 23, 30]
    assert Checkpoints(tmp_path / "checkpoints").info(30).info["steps_per_call"] == 1


def test_a_difference_costs_no_step(blocks, clock, monkeypatch):
    compared = []
    monkeypatch.setattr(dispatch, "same_bits", lambda *both: compared.append(both) is not None)
    one = fit(made(dropout), 1, steps=400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(fit(made(dropout), "auto", steps=400), one)
    assert len(compared) == 1
    assert not blocks


def test_same_bits_sees_every_leaf():
    tree = {"a": jnp.array([jnp.nan, 0.0]), "key": jax.random.key(0), "n": jnp.int32(1), "flag": jnp.array([True])}
    assert loop_blocks.same_bits(tree, dict(tree))
    for name, other in {"a": jnp.array([jnp.nan, -0.0]), "key": jax.random.key(1), "n": jnp.int32(2),
                        "flag": jnp.array([False])}.items():  # fmt: skip
        assert not loop_blocks.same_bits(tree, {**tree, name: other})


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "fast", True, None])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=r'a whole number, at least 1 .* or "auto"'):
        fit(made(), wrong)


# ---- the schedule ---------------------------------------------------------------------------------------------------

PLANS = Cadence(50, 7, 3, 11), Cadence(20, 20, 100, 6), Cadence(9, 100, 4, 100), Cadence(50, 17, 6, 20)


@pytest.mark.parametrize("cadence", PLANS)
def test_a_row_ends_where_the_schedule_closes_it(cadence):
    for step in range(cadence.steps):
        assert cadence.row_end(step) == next(s for s in range(step + 1, 99) if cadence.closes_row(s))


@pytest.mark.parametrize("cadence", PLANS)
def test_no_block_crosses_a_point_where_something_happens(cadence):
    done, sizes = 0, set()
    while size := loop_blocks.size(cadence, 3, done):
        assert not any(cadence.closes_row(step) for step in range(done + 1, done + size))
        done, sizes = done + size, sizes | {size}
    assert done == cadence.steps
    assert sizes == {1, 3}


def test_the_chosen_block_divides_the_rows_where_it_can():
    assert loop_blocks.best_size(Cadence(1000, 112, 112, 224), 0, 16) == 16
    assert loop_blocks.best_size(Cadence(90, 45, 45, 90), 0, 16) == 15
    assert loop_blocks.best_size(Cadence(1000, 112, 112, 224), 0, 64) == 28  # 104 steps are left in the end
    assert loop_blocks.best_size(Cadence(10, 1, 1, 1), 0, 16) == 1


def test_a_block_holds_fewer_steps_where_batches_are_large_or_it_is_unrolled():
    def programs(*shape):
        batch = {"x": jax.ShapeDtypeStruct(shape, "float32")}
        return loop_blocks.StepPrograms(None, None, 0.0, None, None, None, batch)

    assert programs(32, 784).largest(False) == loop_blocks.LARGEST
    assert programs(32, 784).largest(True) == loop_blocks.UNROLLED
    assert programs(2**20).largest(False) == 4
    assert programs(2**24).largest(False) == 1
