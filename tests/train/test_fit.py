"""`fit`: what it returns, writes and resumes; what it costs in compilations; what goes wrong in it."""

import json
import logging
import math
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import sapwood as sw
from sapwood import CheckError, CheckpointError, ConfigError, DataError
from sapwood import metrics as M
from sapwood.data.loading import load
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import EarlyStopping, LossScale, ReduceOnPlateau, Trainer, supervised
from sapwood.train.record.jsonl import read_rows
from sapwood.train.step import checks

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(22, 4)).astype("float32"), "label": (np.arange(22) % 3).astype("int32")}
ROW_KEYS = {"step", "epoch", "loss", "accuracy", "steps_per_second"}


def spread(key, shape, dtype):
    return jnp.sin(3.0 * jnp.arange(np.prod(shape))).reshape(shape).astype(dtype)


def model(v, x):
    mean = v.norm.state("mean", (4,), jax.nn.initializers.zeros)
    if v.train:
        v.norm.put(mean=0.9 * mean + 0.1 * x.mean(0))
        x = x * jax.random.bernoulli(v.drop.rng("mask"), 0.9, x.shape)
    return (x - mean) @ v.head.param("kernel", (4, 3), spread)


OBJECTIVE = supervised(model, inputs="x")
# One trainer for most tests: what it compiles for evaluation is kept.
TRAINER = Trainer(OBJECTIVE, optax.adam(0.1), ema=0.9)
FROZEN = Trainer(OBJECTIVE, optax.sgd(0.0))  # nothing improves
SGD = optax.sgd(0.1)
FIT = {"epochs": 4, "batch_size": 4, "validation": DATA, "seed": 5, "progress": False}


def linear(v, x):
    return x @ v.head.param("kernel", (4, 3), spread)


@pytest.fixture(scope="module")
def first():
    """The state of `TRAINER` before any step; nothing uses it up."""
    return TRAINER.init(0, {name: x[:4] for name, x in DATA.items()})


def logits_by_hand(state):
    """What a state predicts for `DATA`, in NumPy."""
    mean, kernel = jax.device_get((state.ema_state["norm"]["mean"], state.ema["head"]["kernel"]))
    return (DATA["x"] - mean) @ kernel


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return all(np.array_equal(bits(x), bits(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def lasting(rows):
    """The rows without what depends on the clock."""
    return [{name: x for name, x in row.items() if name != "steps_per_second"} for row in rows]


class Killed(BaseException):
    pass


def kill_at(step):
    def callback(event, memory):
        memory["rows"] = memory.get("rows", 0) + 1
        if event.step == step:
            raise Killed

    return callback


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    return directory, TRAINER.fit(DATA, run=directory, checkpoint_every=8, callbacks=[kill_at(None)], **FIT)


def test_rows_count_steps_and_epochs_and_hold_validation_at_their_ends(unbroken):
    _, (state, history) = unbroken
    assert int(state.step) == 24  # six batches an epoch: the last is filled from the next pass
    assert [(row["step"], row["epoch"]) for row in history] == [(6, 1), (8, 2), (12, 2), (16, 3), (18, 3), (24, 4)]
    for row in history:
        assert set(row) >= ROW_KEYS
        assert ("validation_loss" in row) == (row["step"] % 6 == 0)
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_logs_hold_the_rows(unbroken):
    directory, (_, history) = unbroken
    assert read_rows(directory / "metrics.jsonl") == history
    assert list((directory / "tensorboard").iterdir())


def test_validation_in_the_loop_is_evaluate_afterwards(unbroken):
    _, (state, history) = unbroken
    found = TRAINER.evaluate(state, DATA)
    assert found["loss"] == pytest.approx(history[-1]["validation_loss"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, np.int64(5), 22, 64])
def test_evaluation_is_exact_over_uneven_batches(unbroken, batch_size):
    _, (state, _) = unbroken
    logits = logits_by_hand(state)
    loss = np.mean(special.logsumexp(logits, axis=1) - logits[np.arange(22), DATA["label"]])
    found = TRAINER.evaluate(state, DATA, batch_size)
    assert found["accuracy"] == np.mean(np.argmax(logits, 1) == DATA["label"])
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)


def test_predictions_come_in_order_and_without_padding(unbroken):
    _, (state, _) = unbroken
    logits = logits_by_hand(state)
    for batch_size in (5, None):
        predicted = TRAINER.predict(state, {"x": DATA["x"]}, batch_size)
        assert isinstance(predicted, np.ndarray)
        np.testing.assert_allclose(predicted, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [6, 8, 16, 18])
def test_killed_and_resumed_ends_where_an_unbroken_run_ends(unbroken, tmp_path, step):
    _, (state, history) = unbroken
    options = {**FIT, "run": tmp_path, "checkpoint_every": 8, "resume": True}
    with pytest.raises(Killed):
        TRAINER.fit(DATA, callbacks=[kill_at(step)], **options)
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 99, "loss": 0')  # what a killed process left half-written
    resumed = TRAINER.fit(DATA, callbacks=[kill_at(None)], **options)
    assert equal(resumed.state, state)
    assert lasting(resumed.history) == lasting(history)
    assert lasting(read_rows(tmp_path / "metrics.jsonl")) == lasting(history)


def test_resuming_a_finished_run_changes_nothing(unbroken):
    directory, (state, history) = unbroken
    again = TRAINER.fit(DATA, run=directory, resume=True, checkpoint_every=8, callbacks=[kill_at(None)], **FIT)
    assert equal(again.state, state)
    assert again.history == history


def test_early_stopping_ends_the_run_and_a_resume_does_not_go_on(tmp_path):
    options = {**FIT, "epochs": 9, "run": tmp_path, "callbacks": [EarlyStopping("loss", patience=2, delta=1.0)]}
    state, history = FROZEN.fit(DATA, **options)
    assert history[-1]["epoch"] == 3
    again = FROZEN.fit(DATA, resume=True, **options)
    assert equal(again.state, state)


def test_what_had_ended_a_run_begins_afresh_where_it_goes_on_anyway_and_so_does_another_callback(tmp_path):
    stop, options = EarlyStopping("loss", patience=1, delta=1.0), {**FIT, "epochs": 9, "run": tmp_path}

    def rows(resume, *callbacks):
        return len(FROZEN.fit(DATA, resume=resume, callbacks=callbacks, **{**options, "validation": None}).history)

    assert rows(False, stop) == 2
    assert rows("anyway", stop) == 4  # by the memory of before it was 3
    assert rows("anyway", EarlyStopping("accuracy", patience=1, mode="max")) == 6
    with pytest.raises(ConfigError, match="inject_hyperparams"):  # a KeyError of another's memory
        rows("anyway", ReduceOnPlateau("loss"))


def test_functions_that_change_places_would_have_each_others_memory(tmp_path):
    def one(event, memory):
        memory["one"] = event.step

    def other(event, memory):
        memory["other"] = event.step

    options = {**FIT, "validation": None, "run": tmp_path}
    FROZEN.fit(DATA, callbacks=[one, other], **{**options, "epochs": 1})
    with pytest.raises(ConfigError, match=r"callback 0 was .*one, whose memory was saved, and is now .*other; give"):
        FROZEN.fit(DATA, callbacks=[other, one], resume=True, **options)
    FROZEN.fit(DATA, callbacks=[other, one], resume="anyway", **{**options, "epochs": 2})
    assert Checkpoints(tmp_path / "checkpoints").info(12).info["callbacks"] == [{"other": 12}, {"one": 12}]


def test_a_run_that_goes_on_anyway_keeps_its_best(tmp_path):
    options = {**FIT, "validation": None, "keep": 1, "run": tmp_path}
    FROZEN.fit(DATA, best="max:steps_per_second", **{**options, "epochs": 1})
    state, _ = FROZEN.fit(DATA, resume="anyway", best="min:epoch", **{**options, "epochs": 2})
    assert int(state.step) == 6
    state, _ = FROZEN.fit(DATA, resume="anyway", **{**options, "epochs": 4})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert (int(state.step), checkpoints.best(), checkpoints.steps()) == (6, 6, [6, 24])


def test_the_memory_of_callbacks_survives_a_resume(tmp_path):
    stop = EarlyStopping("loss", patience=4, delta=1.0)
    options = {**FIT, "epochs": 9, "run": tmp_path, "checkpoint_every": 6, "resume": True}
    with pytest.raises(Killed):
        FROZEN.fit(DATA, callbacks=[stop, kill_at(18)], **options)
    _, history = FROZEN.fit(DATA, callbacks=[stop, kill_at(None)], **options)
    assert history[-1]["epoch"] == 5
    with pytest.raises(ConfigError, match="saved with 2 callbacks and is resumed with 1"):
        FROZEN.fit(DATA, callbacks=[stop], **options)


def test_the_best_checkpoint_is_kept(tmp_path):
    _, history = TRAINER.fit(DATA, run=tmp_path, keep=1, best="min:validation_loss", **FIT)
    losses = {row["step"]: row["validation_loss"] for row in history if "validation_loss" in row}
    kept = Checkpoints(tmp_path / "checkpoints", best="min:validation_loss")
    assert kept.best() == min(losses, key=losses.get)


@pytest.mark.costs("four runs")
def test_with_best_a_run_ends_with_its_best_state_however_it_is_asked(tmp_path):
    """The labels are wrong in validation, so that it soon gets worse; the best is a run of so many epochs."""
    wrong = {**DATA, "label": (DATA["label"] + 1) % 3}
    options = {**FIT, "validation": wrong}
    stop = [EarlyStopping(patience=1, restore=True)]
    best = TRAINER.fit(DATA, best="min:validation_loss", **options)
    stopped = TRAINER.fit(DATA, callbacks=stop, **options)
    kept = TRAINER.fit(DATA, callbacks=stop, run=tmp_path, **options)
    losses = [row["validation_loss"] for row in best.history]
    epochs = 1 + losses.index(min(losses))
    expected, _ = TRAINER.fit(DATA, **{**options, "epochs": epochs})
    assert [len(run.history) for run in (best, stopped, kept)] == [4, epochs + 1, epochs + 1]
    for found in (best, stopped, kept):
        assert equal(found.state, expected)
        assert TRAINER.evaluate(found.state, wrong)["loss"] == min(losses)
    assert sw.load(tmp_path).extra["step"] == 6 * epochs
    assert sw.load(tmp_path, step="last").extra["step"] == 6 * epochs + 6
    again = TRAINER.fit(DATA, callbacks=stop, run=tmp_path, resume=True, **options)
    assert equal(again.state, expected)
    with pytest.raises(ConfigError, match='the run keeps the best by "min:validation_loss", not by "max:accuracy"'):
        TRAINER.fit(DATA, best="max:accuracy", run=tmp_path, resume=True, **options)


def test_a_resume_that_does_not_say_by_which_metric_keeps_the_best_all_the_same(tmp_path):
    wrong = {**DATA, "label": (DATA["label"] + 1) % 3}
    options = {**FIT, "validation": wrong, "run": tmp_path, "keep": 1}
    _, history = TRAINER.fit(DATA, best="min:validation_loss", **options)
    state, longer = TRAINER.fit(DATA, resume=True, **{**options, "epochs": 5})
    losses = {row["step"]: row["validation_loss"] for row in longer if "validation_loss" in row}
    assert (len(history), len(longer)) == (4, 5)
    assert int(state.step) == min(losses, key=losses.__getitem__) < 24
    assert Checkpoints(tmp_path / "checkpoints").steps() == [int(state.step), 30]


def test_the_best_is_kept_where_checkpoints_are_due_at_other_steps_than_epochs_end(tmp_path):
    rows = TRAINER.fit(DATA, run=tmp_path, keep=1, best="min:validation_loss", checkpoint_every=4, **FIT).history
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert Checkpoints(tmp_path / "checkpoints", best="min:validation_loss").best() == min(losses, key=losses.get)


def test_a_run_goes_on_whose_running_mean_was_saved_in_bfloat16_and_without_statistics(tmp_path, monkeypatch):
    trainer = Trainer(OBJECTIVE, SGD, ema=0.9, policy=sw.Policy("bfloat16", param="bfloat16"))
    save = Checkpoints.save

    def as_before(self, step, tree, *rest):
        narrow = jax.tree.map(lambda x: x.astype("bfloat16"), tree.ema)
        save(self, step, tree.replace(ema=narrow, ema_state=None), *rest)

    options = {"batch_size": 4, "progress": False, "run": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", as_before)
        first, _ = trainer.fit(DATA, steps=2, **options)
    state, _ = trainer.fit(DATA, steps=3, resume=True, **options)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    mean, after = (x["head"]["kernel"].astype("float32") for x in (first.ema, state.params))
    np.testing.assert_allclose(state.ema["head"]["kernel"], 0.25 * mean + 0.75 * after, rtol=1e-2, atol=1e-4)
    mean, before, after = (x["norm"]["mean"] for x in (state.ema_state, first.state, state.state))
    np.testing.assert_allclose(mean, 0.25 * before + 0.75 * after, rtol=1e-5)


def test_nothing_is_compiled_twice(monkeypatch):
    traced = []

    def watched(v, x):
        traced.append(v.train)
        return model(v, x)

    trainer = Trainer(supervised(watched, inputs="x"), optax.sgd(0.1))
    state, _ = trainer.fit(DATA, **FIT)
    # declared once in either mode (and once more by the plan's shapes), then one training and one evaluation program
    in_fit = traced.count(True), traced.count(False)
    trainer.fit(DATA, **{**FIT, "epochs": 1})
    assert traced.count(True) - in_fit[0] <= 3
    before = len(traced)
    trainer.evaluate(state, DATA)
    trainer.evaluate(state, {name: x[:9] for name, x in DATA.items()}, 22)
    trainer.predict(state, DATA)
    trainer.predict(state, DATA)
    assert len(traced) - before == 1  # the program that predicts
    assert in_fit[0] <= 3
    assert in_fit[1] <= 3


def test_each_program_of_a_run_is_compiled_once_ahead_of_its_use(caplog):
    trainer = Trainer(supervised(model, inputs="x"), optax.sgd(0.1))
    jax.config.update("jax_log_compiles", True)  # of all threads
    try:
        with caplog.at_level(logging.WARNING):
            trainer.fit(DATA, **FIT)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Finished XLA compilation")]
    for program in ("jit(train_step)", "jit(evaluate_step)"):
        found = [record.threadName for record in compiled if program in record.getMessage()]
        assert len(found) == 1
        assert found[0].startswith("sapwood-start")


def test_from_a_given_state_which_is_left_whole(first):
    state = first
    after, _ = TRAINER.fit(DATA, state=state, steps=2, batch_size=4, progress=False)
    assert int(after.step) == 2
    assert int(state.step) == 0
    assert np.isfinite(state.params["head"]["kernel"]).all()  # not donated
    on, _ = TRAINER.fit(DATA, state=after, steps=4, batch_size=4, progress=False)
    straight, _ = TRAINER.fit(DATA, state=state, steps=4, batch_size=4, progress=False)
    assert equal(on, straight)


def test_a_given_state_may_hold_numbers_of_the_host(first):
    params = jax.tree.map(np.asarray, first.params)
    expected, found = (
        TRAINER.fit(DATA, state=given, steps=2, batch_size=4, progress=False)
        for given in (first, first.replace(step=0, params=params))
    )
    assert equal(expected.state, found.state)
    assert np.isfinite(params["head"]["kernel"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.replace(ema=None), "it lacks 'ema/head/kernel'"),
        (lambda state: state.replace(scale=LossScale().init()), "it has 'scale/scale', 'scale/good', 'scale/skipped' "),
        (lambda state: state.replace(params={"head": {"kernel": jnp.zeros((5, 3), "bfloat16")}}),
         r"params/head/kernel is bfloat16\[5,3\] there and float32\[4,3\] here"),
        (lambda state: state.replace(rng=jax.random.key(0, impl="rbg")),
         r"rng is key<rbg>\[\] there .*give state.replace\(rng=jax.random.key\(0\)\), or set jax_default_prng_impl"),
        (lambda state: state.params, "it lacks 'step', 'params/head/kernel', .* more; it has 'head/kernel' in"),
    ],
)  # fmt: skip
def test_a_given_state_of_another_trainer_is_refused_with_what_differs(first, change, message):
    with pytest.raises(ConfigError, match=rf"fit\(state=...\): the state is not one of this trainer: {message}"):
        TRAINER.fit(DATA, state=change(first), steps=2, batch_size=4, progress=False)


def test_the_rate_of_a_schedule_that_is_given_is_logged():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    trainer = Trainer(OBJECTIVE, optax.sgd(schedule), learning_rate=schedule)
    _, history = trainer.fit(DATA, steps=4, batch_size=4, log_every=2, progress=False)
    assert [row["learning_rate"] for row in history] == pytest.approx([0.9, 0.7])


def test_a_row_that_is_read_late_has_the_rate_of_its_step():
    schedule = optax.linear_schedule(1.0, 0.0, 20)
    trainer = Trainer(
        OBJECTIVE, optax.sgd(schedule), learning_rate=schedule, policy="float16",
        scaling=LossScale(initial=2.0**14, interval=2),  # grows until a step overflows and is skipped
    )  # fmt: skip
    options = {"steps": 12, "batch_size": 4, "log_every": 1, "steps_per_call": 1, "progress": False}
    state, late = trainer.fit(DATA, **options)
    _, at_once = trainer.fit(DATA, callbacks=[lambda event, memory: None], **options)
    assert int(state.scale.skipped) > 0
    assert [row["learning_rate"] for row in late] == [row["learning_rate"] for row in at_once]


def test_a_matrix_among_the_metrics_is_logged_too(tmp_path):
    trainer = Trainer(supervised(model, metrics=("confusion",), inputs="x"), optax.sgd(0.1))
    _, history = trainer.fit(DATA, run=tmp_path, **{**FIT, "epochs": 1})
    assert history[0]["confusion"].sum() == 24
    assert np.sum(json.loads((tmp_path / "metrics.jsonl").read_text())["validation_confusion"]) == 22


def test_numbers_that_json_and_tensorboard_do_not_hold_are_logged_and_read_back(tmp_path):
    class Odd(M.Metric):
        value: Any

        def compute(self):
            return np.array([0.5, math.nan])

    def objective(v, batch):
        loss, found = OBJECTIVE(v, batch)
        huge = jnp.where(jnp.isnan(loss), 1.0, 400.0)
        return loss, {**found, "classes": Odd(loss), "perplexity": M.ExpMean.of(huge * jnp.ones(4))}

    trainer = Trainer(objective, optax.sgd(0.1))
    options = {"batch_size": 4, "progress": False, "run": tmp_path}
    trainer.fit(DATA, epochs=1, **options)
    _, history = trainer.fit(DATA, epochs=2, resume=True, **options)
    assert [row["perplexity"] for row in history] == [pytest.approx(math.exp(400))] * 2
    for row in history:
        np.testing.assert_array_equal(row["classes"], [0.5, math.nan])


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def wrong_label(at):
    label = DATA["label"].copy()
    label[at] = 7
    return {**DATA, "label": label}


def test_a_label_outside_the_classes_is_named_with_step_and_entry():
    with pytest.raises(CheckError, match=r"label outside the 3 classes 0 to 2 at entry \d") as caught:
        TRAINER.fit(wrong_label(13), **{**FIT, "validation": None})
    stream = np.random.RandomState([5, 0]).permutation(22)
    step, entry = divmod(int(np.flatnonzero(stream == 13)[0]), 4)
    assert caught.value.__notes__ == [f"in step {step + 1} (epoch 1): entry {entry} is example 13"]
    assert f"entry {entry}" in str(caught.value)


def test_a_wrong_label_in_the_validation_data_says_so():
    with pytest.raises(CheckError, match="label outside the 3 classes") as caught:
        TRAINER.fit(DATA, **{**FIT, "validation": wrong_label(13)})
    assert "validation data" in caught.value.__notes__[0]


def test_nan_in_an_input_that_the_data_did_not_check_is_named():
    from dataclasses import replace

    x = DATA["x"].copy()
    x[7, 2] = np.nan
    data = load({**DATA, "x": x})
    data = data.declare(x=replace(data.features["x"], finite=False))
    with pytest.raises(CheckError, match=r"input 'x' of the batch is nan at entry \d, position 2; 1 of 4"):
        TRAINER.fit(data, **{**FIT, "validation": None})


def test_a_mask_of_positions_leaves_out_what_it_covers_and_fits_every_input():
    mask = np.array([[True, False], [False, False]])
    fine = {"x": np.array([[1, np.nan], [np.nan, 1]]), "weight": np.array([1, np.nan]), "mask": mask}
    checks._inputs(jax.device_put(fine), True)
    with pytest.raises(CheckError, match="input 'weight' of the batch is nan at entry 0"):
        checks._inputs(jax.device_put({"weight": np.array([np.nan, 1]), "mask": mask}), True)


def test_nan_in_declared_data_stops_in_the_pipeline():
    x = DATA["x"].copy()
    x[7, 2] = np.inf
    with pytest.raises(DataError, match="7"):
        TRAINER.fit({**DATA, "x": x}, **{**FIT, "validation": None})


def test_the_layer_where_the_first_nan_arises_is_named():
    import sapwood as sw

    @sw.layer
    def logarithm(v, x):
        return jnp.log(x @ v.param("kernel", (4, 3), spread))

    def deep(v, x):
        return logarithm(v.middle.log, x) @ v.head.param("kernel", (3, 3), spread)

    trainer = Trainer(supervised(deep, inputs="x"), optax.sgd(0.1))
    with pytest.raises(CheckError, match=r"first NaN arises in middle/log: logarithm on float32\[4,4\]"):
        trainer.fit(DATA, **{**FIT, "validation": None})


def test_a_gradient_that_is_not_finite_is_named_with_its_step():
    """In the last step of all, too, after which no loss would tell."""

    def objective(v, batch):
        w, other = v.deep.param("kernel", (4,), spread), v.other.param("kernel", (4,), spread)
        worst = batch["label"].min()  # 0 where no label is; the order below puts one such batch last
        return jnp.sum(jnp.sqrt((1 + w * w) * worst)) + jnp.sum(other), {}

    data = {"label": np.int32([3, 2, 1, 2, 1, 3, 0, 3])}
    order = np.random.RandomState([0, 0]).permutation(8)
    data["label"] = data["label"][np.argsort(order)]
    with pytest.raises(CheckError, match="the gradient of deep/kernel is not finite, though the loss is") as caught:
        Trainer(objective, optax.sgd(0.1)).fit(data, steps=4, batch_size=2, progress=False)
    assert caught.value.__notes__ == ["in step 4 (epoch 1)"]


def test_gradients_too_large_to_be_clipped_are_told_from_such_that_are_not_finite():
    def objective(v, batch):
        return 1e28 * jnp.sum(v.param("kernel", (4,), spread)) * jnp.sum(batch["x"]), {}

    with pytest.raises(CheckError, match=r"gradients are, up to 2e\+28, but .* Trainer\(clip=1.0\) cannot scale them"):
        Trainer(objective, SGD, clip=1.0).fit({"x": np.full(2, 1.0, "f4")}, steps=1, batch_size=2, progress=False)


def test_parameters_that_are_not_finite_are_named(first):
    broken = first.replace(params=jax.tree.map(lambda x: x * jnp.nan, first.params))
    with pytest.raises(CheckError, match="params head/kernel are not finite before this step"):
        TRAINER.fit(DATA, state=broken, steps=4, batch_size=4, progress=False)


def test_a_run_that_loss_scaling_cannot_help_ends_with_a_reason():
    trainer = Trainer(supervised(linear, inputs="x"), SGD, policy="float16", scaling=LossScale(initial=4.0))
    huge = {**DATA, "x": DATA["x"] * np.float32(1e6)}
    with pytest.raises(CheckError, match="the loss is not finite") as caught:
        trainer.fit(huge, steps=8, batch_size=4, progress=False)
    assert caught.value.__notes__[0] == "in step 3 (epoch 1)"
    assert "the loss scale had fallen to 1" in caught.value.__notes__[1]


def test_a_schedule_that_is_at_its_end_begins_again_by_restart():
    """`replace(step=0)` left it there: training by a rate of 0."""
    trainer = Trainer(OBJECTIVE, optax.adam(optax.cosine_decay_schedule(0.1, 4)), ema=0.9)
    options = {"steps": 4, "batch_size": 4, "progress": False}
    done, _ = trainer.fit(DATA, **options)
    with pytest.raises(ConfigError, match=r"at step 4 and the run ends at step 4; .* trainer.restart\(state\)"):
        trainer.fit(DATA, state=done, **options)
    with pytest.raises(ConfigError, match=r"at step 0, but its optimizer's schedule is at update 4.*restart\(state\)"):
        trainer.fit(DATA, state=done.replace(step=jnp.int32(0)), **options)
    again = trainer.restart(done)
    assert equal((again.params, again.state), (done.params, done.state))
    assert again.features == done.features is not None
    assert not equal(again.rng, done.rng)
    assert not any(np.any(x) for x in jax.tree.leaves(again.opt_state))
    after, _ = trainer.fit(DATA, state=again, **options)
    assert np.abs(after.params["head"]["kernel"] - done.params["head"]["kernel"]).max() > 0.01


def test_a_plateau_of_the_validation_loss_halves_the_rate_for_the_next_epoch():
    trainer = Trainer(OBJECTIVE, optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    reduce = ReduceOnPlateau(factor=0.5, patience=1, delta=100.0)  # nothing improves that much
    state, history = trainer.fit(DATA, callbacks=[reduce], **FIT)
    assert [row["learning_rate"] for row in history] == [0.5, 0.5, 0.25, 0.125]
    assert float(state.opt_state.hyperparams["learning_rate"]) == 0.0625


def test_without_jit_a_wrong_label_raises_where_it_is():
    plain = Trainer(supervised(linear, inputs="x"), SGD, jit=False)
    with pytest.raises(CheckError, match="label outside the 3 classes 0 to 2 at entry"):
        plain.fit(wrong_label(slice(0, 22)), **{**FIT, "validation": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "either epochs= or steps=, got neither"),
        ({"resume": True}, "needs run="),
        ({"best": "-loss"}, 'best=.-loss.: "min:loss" where the smallest is best, or "max:loss" where the largest is'),
        ({"best": "min:loss", "callbacks": [EarlyStopping(restore=True)]}, 'want "min:loss" and "min:validation_loss"'),
        ({"batch_size": 0}, "at least one example"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        TRAINER.fit(DATA, **{**FIT, **options})


def test_best_by_validation_needs_validation(tmp_path):
    with pytest.raises(ConfigError, match=r"needs fit\(validation"):
        TRAINER.fit(DATA, **{**FIT, "validation": None, "best": "min:validation_loss", "run": tmp_path})


def test_a_run_does_not_go_on_as_another_unless_that_is_meant(unbroken, tmp_path, capsys):
    directory, _ = unbroken
    copied = shutil.copytree(directory, tmp_path / "run")
    options = {**FIT, "run": copied, "callbacks": [kill_at(None)]}
    other = Trainer(OBJECTIVE, optax.nadam(0.1), ema=0.9)
    with pytest.raises(ConfigError, match="optimizer: nesterov of scale_by_adam was False and is now True"):
        other.fit(DATA, resume=True, **options)
    with pytest.raises(ConfigError, match="run is at step 24 and is to end at step 6; ask for more epochs"):
        TRAINER.fit(DATA, resume=True, **{**options, "epochs": 1})
    longer = {**options, "epochs": 5, "progress": True}
    after, history = other.fit(DATA, resume="anyway", **longer)
    assert (int(after.step), history[-1]["epoch"]) == (30, 5)
    said = "goes on from step 24 of 30 (epoch 4 of 5), although optimizer: nesterov of scale_by_adam was False"
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="nesterov of scale_by_adam was True and is now False"):
        TRAINER.fit(DATA, resume=True, **longer)
    with pytest.raises(ConfigError, match=r'resume=.yes.\): True, False or "anyway" is expected'):
        TRAINER.fit(DATA, resume="yes", **longer)


def test_a_directory_of_another_run_is_not_overwritten(unbroken):
    directory, _ = unbroken
    with pytest.raises(CheckpointError, match="already holds a run"):
        TRAINER.fit(DATA, run=directory, **FIT)


def test_a_run_of_another_model_is_not_resumed(unbroken):
    directory, _ = unbroken
    other = Trainer(supervised(lambda v, x: x @ v.other.param("w", (4, 3), spread), inputs="x"), optax.adam(0.1))
    with pytest.raises(CheckpointError, match="another model"):
        other.fit(DATA, run=directory, resume=True, **FIT)


def test_other_data_or_another_seed_is_not_resumed(unbroken):
    directory, _ = unbroken
    options = {**FIT, "run": directory, "resume": True, "callbacks": [kill_at(None)]}
    with pytest.raises(DataError, match="seed 5; this has 6"):
        TRAINER.fit(DATA, **{**options, "seed": 6})


def test_an_empty_data_set_says_so(first):
    with pytest.raises(DataError):
        TRAINER.fit({name: x[:0] for name, x in DATA.items()}, **FIT)
    with pytest.raises(DataError, match="empty"):
        TRAINER.evaluate(first, load(DATA)[:0])


def test_a_missing_feature_is_named_with_what_there_is():
    with pytest.raises(DataError, match=r"no feature 'x'.*it has label, y"):
        TRAINER.fit({"y": DATA["x"], "label": DATA["label"]}, **FIT)


def test_an_objective_without_predict_says_how_to(first):
    trainer = Trainer(lambda v, batch: (jnp.float32(0), {}), optax.sgd(0.1))
    with pytest.raises(ConfigError, match=r"no predict\(v, batch\)"):
        trainer.predict(first, DATA)


def test_a_state_that_is_at_the_end_already_is_refused(unbroken):
    _, (state, _) = unbroken
    with pytest.raises(ConfigError, match=r"at step 24 and the run ends at step 20; .* steps=44 adds as many"):
        TRAINER.fit(DATA, state=state, steps=20, batch_size=4, progress=False)
    with pytest.raises(ConfigError, match="epochs=8 adds as many again"):
        TRAINER.fit(DATA, state=state, epochs=4, batch_size=4, progress=False)
