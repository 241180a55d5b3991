"""`supervised`, and what any objective has to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import sapwood as sw
from sapwood import ConfigError, DataError
from sapwood.train import Last, Trainer, supervised
from sapwood.train.metrics import compute

zeros = jax.nn.initializers.zeros
BATCH = {"x": np.eye(4, dtype="float32"), "label": np.array([0, 1, 2, 2])}


def linear(v, x):
    return x @ v.param("w", (4, 3), zeros)


def run(objective, batch, params, **options):
    whole = jax.jit(lambda params, batch: sw.apply(objective, params, {}, batch, **options)[0])
    loss, metrics = whole(params, batch)
    return float(loss), compute(metrics)


W = np.float32([[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [5, 0, 0]])


def test_loss_and_metrics_under_mask_and_weight():
    objective = supervised(linear, inputs="x")
    each = special.logsumexp(W, axis=1) - W[np.arange(4), BATCH["label"]]
    loss, metrics = run(objective, BATCH, {"w": W})
    assert loss == pytest.approx(float(each.mean()))
    assert metrics == {"accuracy": 0.75}
    masked = {**BATCH, "mask": np.array([True, True, True, False])}
    loss, metrics = run(objective, masked, {"w": W})
    assert loss == pytest.approx(float(each[:3].mean()))
    assert metrics == pytest.approx({"accuracy": 1.0, "loss": loss})
    weighted = {**masked, "weight": np.float32([1.0, 0.0, 3.0, 9.0])}
    assert run(objective, weighted, {"w": W})[0] == pytest.approx(float((each[0] + 3 * each[2]) / 4))


def test_several_inputs_and_a_metric_of_your_own():
    def two(v, x, y):
        return linear(v, x + y)

    def margin(outputs, target, weight):
        return jnp.max(outputs, -1)  # one value per example: averaged under the weight

    objective = supervised(two, metrics=(margin, "top_5_accuracy"), inputs=("x", "y"))
    _, metrics = run(objective, {**BATCH, "y": BATCH["x"]}, {"w": W})
    assert metrics["margin"] == pytest.approx(np.mean([4, 2, 6, 10]))
    assert metrics["top_5_accuracy"] == 1.0


def test_inputs_are_cast_to_the_compute_dtype_and_integers_are_not():
    seen = {}

    def model(v, x, ids):
        seen.update(x=x.dtype, ids=ids.dtype)
        return linear(v, x)

    objective = supervised(model, inputs=("x", "ids"))
    run(objective, {**BATCH, "ids": np.arange(4, dtype="int32")}, {"w": W}, policy="bfloat16")
    assert seen == {"x": jnp.bfloat16, "ids": jnp.int32}


def test_a_loss_over_positions_counts_every_position():
    objective = supervised(lambda v, x: x, "squared_error", (), inputs="x", target="y")
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    batch = {"x": np.ones((2, 3), "float32"), "y": np.zeros((2, 3), "float32"), "mask": mask}
    (loss, metrics), _ = jax.jit(lambda batch: sw.apply(objective, {}, {}, batch))(batch)
    assert float(loss) == 1.0
    assert float(metrics["loss"].weight) == 4.0


def test_what_it_was_made_of_compares_by_value():
    assert supervised(linear, inputs="x") == supervised(linear, inputs=["x"])
    assert hash(supervised(linear)) == hash(supervised(linear))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"loss": "crossentropy"}, "no loss is called 'crossentropy'"),
     ({"metrics": "acuracy"}, "did you mean 'accuracy'"), ({"model": 3}, "a model is a function"),
     ({"target": "mask"}, r"target='mask'\): an entry \"mask\" says which examples .* so it cannot be the target too"),
     ({"inputs": ("height", "weight")}, r"inputs='weight'\): .* how much an example counts .*\"weights\": e\[")],
)  # fmt: skip
def test_names_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        supervised(**{"model": linear, **options})


def test_a_loss_that_took_the_mean_already_says_so():
    objective = supervised(linear, lambda outputs, target: jnp.mean(outputs), inputs="x")
    with pytest.raises(ConfigError, match="return one loss per example"):
        run(objective, BATCH, {"w": W})


def test_a_feature_with_a_name_nearby():
    with pytest.raises(DataError, match=r"no feature 'xs'.*did you mean 'x'"):
        run(supervised(linear, inputs="xs"), BATCH, {"w": W})


@pytest.mark.parametrize(
    ("result", "message"),
    [(jnp.ones(3), "returned ArrayImpl|returned .*Tracer"), ((jnp.ones(3), {}), r"a loss of shape \(3,\)"),
     ((jnp.ones(()), {"m": jnp.ones(2)}), r"metric 'm' .* shape \(2,\)"), ((jnp.ones(()), None), "returns"),
     ((Last(1.0), {}), "a loss of Last; it must be one number or a train.Mean"),
     ((jnp.ones(()), {"loss": jnp.ones(())}), "a metric called 'loss', where the loss itself is logged")],
)  # fmt: skip
def test_an_objective_that_returns_something_else(result, message):
    def objective(v, batch):
        v.param("w", (2,), zeros)
        return result

    trainer = Trainer(objective, optax.sgd(0.1))
    with pytest.raises(ConfigError, match=message):
        trainer.step(trainer.init(0, BATCH), BATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ema": 1.0}, "decay between 0 and 1"), ({"accumulate": 0}, "at least 1 micro-batch"), ({"clip": 0}, "above 0"),
     ({"policy": "float23"}, "floating dtype"), ({"optimizer": "adam"}, "an optax transformation"),
     ({"objective": 3}, r"function \(v, batch\)"), ({"trainable": "nowhere"}, "matches no parameter")],
)  # fmt: skip
def test_a_trainer_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(**{"objective": supervised(linear, inputs="x"), "optimizer": optax.sgd(0.1), **options}).init(0, BATCH)
