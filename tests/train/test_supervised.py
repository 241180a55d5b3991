"""`supervised`, and what any objective has to be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special
from sklearn.metrics import precision_recall_fscore_support

import sapwood as sw
from sapwood import CheckError, ConfigError, DataError, losses
from sapwood.metrics import METRICS, compute
from sapwood.train import Last, Trainer, next_token, supervised

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


@pytest.mark.parametrize(
    ("metric", "returned"),
    [(lambda outputs, target, weight: 1.0, "1.0"), (lambda outputs, target, weight: outputs.mean(), r"float32\[\]"),
     (lambda outputs, target, weight: outputs.mean(0), r"float32\[3\]")],
)  # fmt: skip
def test_a_metric_that_took_the_mean_already_says_so(metric, returned):
    """In training as in evaluation, masked or not, where such a value would be averaged or masked by chance."""
    for more in ({}, {"mask": np.ones(4, bool)}):
        with pytest.raises(ConfigError, match=rf"the metric 'mine' returned {returned} for 4 examples"):
            run(supervised(linear, metrics={"mine": metric}, inputs="x"), {**BATCH, **more}, {"w": W})


def test_a_function_of_other_arguments_is_refused():
    with pytest.raises(ConfigError, match=r"metric <lambda>\(o, t\) does not take \(outputs, target, weight\)"):
        supervised(linear, metrics={"mine": lambda o, t: o})
    with pytest.raises(ConfigError, match=r"loss <lambda>\(o, t, w\) does not take \(outputs, target\): missing"):
        supervised(linear, lambda o, t, w: o)


OUTPUTS = np.float32([[2.0, -1.0, 3.0], [-1.0, 1.0, 1.0], [0.5, -2.0, -3.0], [-0.5, 4.0, -1.0]])
BITS = np.float32([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]])
DEFAULTS = {
    "softmax_cross_entropy": ["accuracy"], "kl_divergence": ["accuracy"], "sigmoid_cross_entropy": ["binary_accuracy"],
    "focal": ["binary_accuracy"], "hinge": ["binary_accuracy"], "squared_error": ["mean_absolute_error"],
    "absolute_error": ["mean_absolute_error"], "huber": ["mean_absolute_error"], "log_cosh": ["mean_absolute_error"],
    "cosine_distance": [],
}  # fmt: skip


def test_the_default_metric_follows_the_loss():
    assert {loss: [name for name, _ in supervised(linear, loss).metrics] for loss in losses.LOSSES} == DEFAULTS
    smooth = functools.partial(losses.softmax_cross_entropy, label_smoothing=0.1)
    assert [name for name, _ in supervised(linear, smooth).metrics] == ["accuracy"]
    assert supervised(linear, lambda outputs, target: outputs[:, 0]).metrics == ()  # what it means is not known


def test_the_accuracy_of_yes_and_no_in_every_shape():
    """Once 1.0 for a column, 0.0 for a vector and that of the largest label for several."""
    shapes = {"vector": (OUTPUTS[:, 0], BITS[:, 0]), "column": (OUTPUTS[:, :1], BITS[:, :1]), "labels": (OUTPUTS, BITS)}
    wanted = "binary_accuracy", "binary_precision", "binary_recall", "binary_f1"
    objective = supervised(lambda v, x: x, "sigmoid_cross_entropy", wanted, inputs="x", target="y")
    run = jax.jit(
        lambda given: {name: sw.apply(objective, {}, {}, {"x": x, "y": y})[0][1] for name, (x, y) in given.items()}
    )
    for name, found in jax.device_get(run(shapes)).items():
        chosen, true = shapes[name][0] > 0, shapes[name][1]
        average = "macro" if name == "labels" else "binary"
        expected = precision_recall_fscore_support(true, chosen, average=average, zero_division=0)[:3]
        np.testing.assert_allclose(list(compute(found).values()), [(chosen == true).mean(), *expected], rtol=1e-6)


def test_a_metric_that_takes_the_outputs_for_something_else_is_refused():
    expected = "metric 'f1' is of classes, but the loss focal takes the outputs for binary labels; .* 'binary_f1'"
    with pytest.raises(ConfigError, match=expected):
        supervised(linear, "focal", "f1")
    for loss, metric in (("squared_error", "binary_accuracy"), ("softmax_cross_entropy", "r2"), ("hinge", "accuracy")):
        with pytest.raises(ConfigError, match=r"metric 'any' is of .* but the loss"):
            supervised(linear, functools.partial(losses.LOSSES[loss]), {"any": functools.partial(METRICS[metric])})


def test_metrics_with_names_of_ones_own():
    chosen = {"strict": functools.partial(METRICS["binary_recall"], threshold=0.9), "usual": "binary_recall"}
    objective = supervised(lambda v, x: x, "sigmoid_cross_entropy", chosen, inputs="x")
    batch = {"x": np.float32([1.0, 3.0, 1.0, -1.0]), "label": np.float32([1, 1, 0, 0])}
    assert run(objective, batch, {})[1] == {"strict": 0.5, "usual": 1.0}


def test_a_target_that_a_metric_would_misread_is_flagged():
    """Also where the loss is one's own and tells nothing: several labels are no distribution over classes."""
    objective = supervised(lambda v, x: x, lambda x, y: x.sum(-1), "precision", inputs="x")
    with pytest.raises(CheckError, match=r"no distribution over the 3 classes.*binary metrics at entry 0"):
        sw.apply(objective, {}, {}, {"x": OUTPUTS, "label": BITS})
    (_, found), _ = sw.apply(objective, {}, {}, {"x": OUTPUTS, "label": np.eye(3, dtype="f4")[[2, 1, 0, 1]]})
    assert compute(found)["precision"] == 1.0


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
     ({"loss": "mse"}, "'mse': here it is \"squared_error\""), ({"loss": 3}, "no loss is called 3"),
     ({"loss": "bce"}, '"sigmoid_cross_entropy", which takes logits'), ({"metrics": "mae"}, '"mean_absolute_error"'),
     ({"metrics": "acuracy"}, "did you mean 'accuracy'"), ({"metrics": {"step": "accuracy"}}, "called 'step'"),
     ({"model": 3}, "a model is a function"),
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
     ((jnp.ones(()), {"step": jnp.ones(())}), "a metric cannot be called 'step'"),
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


class Pooled:
    """A language model whose mask is of positions, as most have it; it knows no segments."""

    def features(self, v, tokens, mask=None):
        x = v.param("table", (7, 4), jax.nn.initializers.normal(1.0))[tokens]
        there = jnp.ones(tokens.shape, bool) if mask is None else mask
        return x + jnp.sum(x * there[:, :, None], 1, keepdims=True)

    def head(self, v):
        return v.param("head", (4, 7), jax.nn.initializers.normal(1.0)), None

    def __call__(self, v, tokens, mask=None):
        return self.features(v, tokens, mask) @ self.head(v)[0]


@pytest.mark.costs("seven small losses in one program")
def test_a_mask_that_models_are_given_is_of_positions():
    """As many rows as positions, where (batch,) would broadcast over positions without a word, and fewer."""
    tokens = np.arange(25).reshape(5, 5) % 7
    data = {"tokens": tokens.astype("int32"), "targets": (tokens[:, ::-1] % 7).astype("int32")}
    one, other = next_token(Pooled()), supervised(Pooled(), inputs="tokens", target="targets")
    params, _ = sw.init(one, 0, data)
    wrong = {**data, "targets": data["targets"].copy()}
    wrong["targets"][3:] = -1

    @jax.jit
    def run(data, wrong):
        of = lambda objective, batch: objective(sw.bind(params), batch)[0]  # noqa: E731
        alone = [of(one, {name: x[:rows] for name, x in data.items()}) for rows in (3, 5)]
        found = [
            [of(objective, {**batch, "weight": (np.arange(5) < rows).astype("float32")}) for objective in (one, other)]
            for batch, rows in ((wrong, 3), (data, 5))
        ]
        short = {name: x[:, :4] for name, x in data.items()}
        more = [of(objective, {**short, "mask": np.ones(5, bool)}) for objective in (one, other)]
        return alone, found, of(one, short), more

    alone, found, short, more = run(data, wrong)
    for expected, each in zip([*alone, short], [*found, more], strict=True):
        np.testing.assert_allclose(each, [expected] * 2, rtol=1e-5)


def mixed(v, x, mask=None):
    return sw.layers.MixtureOfExperts(experts=2, hidden=3, k=1)(v.moe, x, mask)


@pytest.mark.costs("two mixtures in one program")
def test_rows_that_do_not_count_steer_no_mixture():
    """The losses that it adds are of those that count."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    data = {"x": np.concatenate([x[:2] * 50, x])[:, None], "y": np.ones((8, 1, 3), "float32")}
    counts = np.arange(8) >= 2
    objective = supervised(mixed, "squared_error", inputs="x", target="y")
    params, _ = sw.init(objective, 0, data)

    def run(batch):
        (loss, _), updates = sw.pure(objective)(sw.bind(params, rng=0, train=True), batch)
        return loss, updates.losses

    batches = [{name: a[2:] for name, a in data.items()}, {**data, "weight": counts.astype("float32")}]
    alone, weighted = jax.jit(lambda batches: [run(batch) for batch in batches])(batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), weighted, alone)


def test_a_mask_that_is_an_input_stays_one():
    def model(v, x, mask):
        return linear(v, jnp.where(mask[:, None], x, 0))

    batch = {**BATCH, "shown": np.array([True, True, False, True]), "weight": np.ones(4, "float32")}
    loss, _ = run(supervised(model, inputs=("x", "shown")), batch, {"w": W})
    each = special.logsumexp(W, axis=1) - W[np.arange(4), BATCH["label"]]
    each[2] = np.log(3)
    assert loss == pytest.approx(each.mean(), rel=1e-5)


@pytest.mark.parametrize("counts", [{"mask": np.arange(4) > 0}, {"weight": np.float32([0, 1, 1, 1])}], ids=list)
def test_a_label_that_does_not_count_is_not_checked(counts):
    batch, objective = {**BATCH, "label": np.array([-1, 1, 2, 2])}, supervised(linear, inputs="x")
    (loss, _), _ = sw.apply(objective, {"w": W}, {}, {**batch, **counts})
    assert loss == pytest.approx(np.mean(special.logsumexp(W[1:], axis=1) - W[[1, 2, 3], [1, 2, 2]]), rel=1e-5)


def test_a_bad_label_or_id_is_told_by_the_number_of_its_example():
    def model(v, x):
        return sw.layers.Dense(2)(v.out, sw.layers.Embed(5, 3)(v.table, x))

    trainer = Trainer(supervised(model, inputs="x"), optax.sgd(0.1))
    ids, label = np.arange(8) % 5, np.arange(8) % 2
    for name, bad, value in (("x", 6, 7), ("label", 3, 9)):
        data = {"x": ids.copy(), "label": label.copy()}
        data[name][bad] = value
        with pytest.raises(CheckError) as found:
            trainer.fit(data, batch_size=4, epochs=1, progress=False)
        assert f"is example {bad}" in found.value.__notes__[-1]
