"""Eight simulated devices against one: the same losses, statistics, metrics and predictions on any mesh."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import ConfigError
from sapwood import layers as L
from sapwood.parallel import DEFAULT
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.train import LossScale, Trainer, supervised
from sapwood.train.evaluation import as_dataset, whole_pass

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(44, 16)).astype("float32"), "label": (np.arange(44) % 3).astype("int32")}


def spread(key, shape, dtype):
    return jnp.sin(3.0 * jnp.arange(np.prod(shape))).reshape(shape).astype(dtype) * 0.3


def model(v, x):
    """Batch statistics, an annotated and an unannotated parameter, and a random mask."""
    mean, var = x.mean(0), x.var(0)
    running = v.norm.state("mean", (16,), jax.nn.initializers.zeros)
    if v.train:
        v.norm.put(mean=0.9 * running + 0.1 * mean)
        x = (x - mean) / jnp.sqrt(var + 1e-3) * jax.random.bernoulli(v.drop.rng("mask"), 0.9, x.shape)
    x = jnp.tanh(x @ v.up.param("kernel", (16, 128), spread, axes=("embed", "mlp")))
    x = v.shard(x, "batch", "mlp")
    return x @ v.head.param("kernel", (128, 3), spread)


OBJECTIVE = supervised(model, inputs="x")
FIT = {"epochs": 2, "batch_size": 16, "validation": DATA, "seed": 1, "log_every": 1, "progress": False}
RULES = dataclasses.replace(DEFAULT, min_size=1)  # else a model of this size is left whole
OPTIONS = {"ema": 0.9, "clip": 1.0}


ADAM, SGD = optax.adam(0.01), optax.sgd(0.1)


@pytest.fixture(scope="module")
def alone():
    """What one device gives: state, history, predictions, metrics."""
    one = Trainer(OBJECTIVE, ADAM, **OPTIONS)
    state, history = one.fit(DATA, **FIT)
    return state, history, one.predict(state, DATA), one.evaluate(state, DATA)


def trainer(axes, **options):
    return Trainer(OBJECTIVE, ADAM, mesh=sw.parallel.mesh(axes), rules=RULES, **options)


@pytest.mark.costs("training, evaluation and prediction are compiled for a mesh")
@pytest.mark.parametrize("axes", ["data=8", "data=4,fsdp=2", "data=2,tensor=4"])
def test_a_run_does_not_depend_on_the_mesh(alone, axes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        across = trainer(axes, **OPTIONS)
        state, history = across.fit(DATA, **FIT)
        predicted = across.predict(state, DATA, 8)
        found = across.evaluate(state, DATA, 8)
    one_state, one_history, one_predicted, one_found = alone
    for mine, theirs in zip(history, one_history, strict=True):
        assert set(mine) == set(theirs)
        for name in set(mine) - {"steps_per_second"}:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(state.state["norm"]["mean"], one_state.state["norm"]["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(predicted, one_predicted, rtol=1e-3, atol=1e-4)
    assert found["accuracy"] == one_found["accuracy"]


@pytest.mark.costs("the training of two meshes is compiled")
@pytest.mark.parametrize(("made", "given"), [(None, "data=2,fsdp=4"), ("fsdp=8", None), ("fsdp=8", "data=2,tensor=4")])
@pytest.mark.filterwarnings("ignore::sapwood.parallel.ShardingWarning")
def test_a_state_goes_on_on_another_mesh_and_is_left_whole(made, given):
    one, other = (Trainer(OBJECTIVE, ADAM) if axes is None else trainer(axes) for axes in (made, given))
    options = {"batch_size": 16, "seed": 1, "progress": False}
    state = one.init(0, {name: x[:16] for name, x in DATA.items()})
    before = jax.tree.map(np.array, state.params)
    expected, found = (each.fit(DATA, state=state, steps=2, **options).state for each in (one, other))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)  # neither run has used it up
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found.params, expected.params)
    again = other.fit(DATA, state=found, steps=3, **options).state
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, found)


def test_arrays_are_born_where_they_live_and_stay_there():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        across = trainer("data=4,fsdp=2", ema=0.9)
        batch = {name: x[:16] for name, x in DATA.items()}
        state = across.init(0, batch)
        where = jax.tree.map(lambda x: x.sharding, state)
        after, _ = across.compiled.train(where)(across.init(0, batch), across.put(batch))
    for tree in (state, after):
        kernel = tree.params["up"]["kernel"]
        assert not kernel.sharding.is_fully_replicated
        assert tree.opt_state[0].mu["up"]["kernel"].sharding == kernel.sharding
        assert tree.ema["up"]["kernel"].sharding == kernel.sharding
        assert tree.state["norm"]["mean"].sharding.is_fully_replicated
        assert tree.step.sharding.is_fully_replicated


@pytest.mark.costs("a scanned stack and its gradient are compiled for eight devices")
@pytest.mark.parametrize("options", [{"ema": 0.9}, {"rules": "zero1"}, {"offload": "optimizer"}], ids=str)
def test_a_loop_of_ones_own_runs_one_program(options):
    """Left to itself, XLA splits the biases that are born whole, and the second step takes another program."""

    def block(v, x):
        return x + L.Dense(64)(v.down, jax.nn.gelu(L.Dense(256)(v.up, x)))

    def model(v, x):
        return L.Dense(3)(v.head, L.Scan(block, 2)(v.blocks, L.Dense(64)(v.stem, x)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        across = Trainer(supervised(model, inputs="x"), optax.adam(0.01), mesh="fsdp=8", **options)
        batch = across.put({name: x[:16] for name, x in DATA.items()})
        state = across.init(0, batch)
        step = jax.jit(across.step, donate_argnums=0).lower(state, batch).compile()
    for _ in range(3):
        state, _ = step(state, batch)  # an error where an array is not where the program expects it
    assert state.step == 3


def test_a_step_may_take_another_way_through_the_model():
    def objective(v, batch):
        return sum(L.Dense(3)(v[name], x).sum() for name, x in batch.items()), {}

    across = Trainer(objective, optax.sgd(0.1), mesh="data=8")
    batch = across.put({"a": np.ones((8, 4), "float32"), "b": np.ones((8, 4), "float32")})
    state = across.init(0, batch)
    after, _ = jax.jit(across.step)(state, {"a": batch["a"]})
    after, before = jax.device_get((after.params, state.params))
    assert (after["b"]["kernel"] == before["b"]["kernel"]).all()
    assert not (after["a"]["kernel"] == before["a"]["kernel"]).any()


def test_accumulation_on_a_mesh_is_the_whole_batch():
    deterministic = supervised(lambda v, x: jnp.tanh(x @ v.param("kernel", (16, 3), spread)), inputs="x")
    batch = {name: x[:32] for name, x in DATA.items()}

    def after(mesh, n):
        one = Trainer(deterministic, optax.sgd(1.0), mesh=mesh, accumulate=n, scaling=LossScale(initial=4))
        state, metrics = jax.jit(one.step)(one.init(0, batch), one.put(batch))
        return np.asarray(state.params["kernel"]), float(metrics["accuracy"].compute())

    expected = after(None, 1)
    for n in (1, 4):
        got = after(sw.parallel.mesh("data=8"), n)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)
        assert got[1] == expected[1]


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, _ = trainer("data=4,fsdp=2").fit(DATA, run=tmp_path, **{**FIT, "validation": None})
        one = Trainer(OBJECTIVE, ADAM)
        again, _ = one.fit(DATA, run=tmp_path, resume=True, **{**FIT, "validation": None})
    np.testing.assert_array_equal(state.params["up"]["kernel"], again.params["up"]["kernel"])
    assert again.params["up"]["kernel"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("size", "accumulate", "message"),
    [(4, 1, "batch size 4 is smaller than the 8 shards"), (20, 1, "20 does not divide over the 8"),
     (16, 4, "batch size 4 is smaller"), (16, 3, "accumulate=3 does not divide the batch of 16")],
)  # fmt: skip
def test_a_batch_that_does_not_divide_says_what_would(size, accumulate, message):
    across = trainer("data=8", accumulate=accumulate)
    with pytest.raises(ConfigError, match=message):
        across.fit(DATA, epochs=1, batch_size=size, progress=False)


def test_an_evaluation_batch_that_does_not_divide_says_what_would():
    state = sw.train.TrainState(0, {}, {}, (), None)
    with pytest.raises(ConfigError, match="batch size 5"):
        trainer("data=8").evaluate(state, DATA, 5)


def piped(v, x):
    return L.Dense(3)(v.head, L.Scan(lambda v, x: x + L.Dense(16)(v, x), 4)(v.blocks, x))


def with_and_without_stages(microbatches):
    options = supervised(piped, inputs="x"), SGD
    rules = dataclasses.replace(DEFAULT, pipeline=Pipeline(microbatches))
    return Trainer(*options), Trainer(*options, mesh="stage=4,data=2", rules=rules)


def examples(n):
    return {"x": RNG.normal(size=(n, 16)).astype("float32"), "label": np.arange(n) % 3}


@pytest.mark.costs("a pipeline of four stages is compiled for training, validation and prediction")
def test_validation_takes_batches_that_a_pipeline_can_cut():
    """288 examples are more than a batch of 256, which 12 micro-batches on 2 devices do not divide."""
    (expected, found), validation = with_and_without_stages(12), examples(288)
    options = {"steps": 1, "batch_size": 24, "validation": validation, "progress": False}
    (_, [alone]), (state, [across]) = expected.fit(DATA, **options), found.fit(DATA, **options)
    for name in ("validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(across[name], alone[name], rtol=1e-5)
    assert found.predict(state, {"x": validation["x"]}).shape == (288, 3)


def test_evaluation_takes_batches_that_a_pipeline_can_cut():
    """16 micro-batches on 2 devices do not divide 100 examples."""
    (expected, found), data = with_and_without_stages(16), examples(100)
    batch = {name: x[:32] for name, x in data.items()}
    alone, across = (each.evaluate(each.init(0, batch), data) for each in (expected, found))
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(across[name], alone[name], rtol=1e-5)
    assert found.predict(found.init(0, batch), {"x": data["x"]}).shape == (100, 3)


def test_validation_takes_batches_that_processes_share(monkeypatch):
    """On a mesh that splits no batch, two processes need an even one still."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    across = Trainer(OBJECTIVE, optax.sgd(0.1), mesh="tensor=8")
    assert whole_pass(across, as_dataset({name: x[:11] for name, x in DATA.items()}), None).batch_size == 12
