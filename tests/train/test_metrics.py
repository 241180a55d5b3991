"""Metrics against scikit-learn, over batches cut unevenly, masked, and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as oracle

from sapwood import ConfigError, DataError
from sapwood.train import metrics

RNG = np.random.default_rng(0)
N, C = 101, 7
LOGITS = RNG.normal(size=(N, C)).astype("float32")
LABELS = RNG.integers(0, C, N).astype("int32")
WEIGHT = RNG.uniform(0.1, 2, N).astype("float32")
BINARY = RNG.integers(0, 2, N).astype("int32")
SCORE = (RNG.normal(size=N) + BINARY).astype("float32")
TARGET = (2 * SCORE + RNG.normal(size=N)).astype("float32")
PREDICTED = LOGITS.argmax(1)

EXPECTED = {
    "accuracy": (LOGITS, LABELS, lambda w: oracle.accuracy_score(LABELS, PREDICTED, sample_weight=w)),
    "top_5_accuracy": (
        LOGITS, LABELS, lambda w: oracle.top_k_accuracy_score(LABELS, LOGITS, k=5, sample_weight=w, labels=range(C))),
    "binary_accuracy": (SCORE, BINARY, lambda w: oracle.accuracy_score(BINARY, SCORE > 0, sample_weight=w)),
    "mean_squared_error": (SCORE, TARGET, lambda w: oracle.mean_squared_error(TARGET, SCORE, sample_weight=w)),
    "mean_absolute_error": (SCORE, TARGET, lambda w: oracle.mean_absolute_error(TARGET, SCORE, sample_weight=w)),
    "root_mean_squared_error": (
        SCORE, TARGET, lambda w: oracle.root_mean_squared_error(TARGET, SCORE, sample_weight=w)),
    "perplexity": (LOGITS, LABELS, lambda w: np.exp(oracle.log_loss(
        LABELS, np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True), sample_weight=w, labels=range(C)))),
    "confusion": (LOGITS, LABELS, lambda w: oracle.confusion_matrix(LABELS, PREDICTED, sample_weight=w)),
    "precision": (LOGITS, LABELS, lambda w: oracle.precision_score(
        LABELS, PREDICTED, average="macro", sample_weight=w, zero_division=0)),
    "recall": (LOGITS, LABELS, lambda w: oracle.recall_score(LABELS, PREDICTED, average="macro", sample_weight=w)),
    "f1": (LOGITS, LABELS, lambda w: oracle.f1_score(LABELS, PREDICTED, average="macro", sample_weight=w)),
    "r2": (SCORE, TARGET, lambda w: oracle.r2_score(TARGET, SCORE, sample_weight=w)),
    "auc": (SCORE, BINARY, lambda w: oracle.roc_auc_score(BINARY, SCORE, sample_weight=w)),
}  # fmt: skip
# The bins of "auc" cost up to half the chance that a positive and a negative share one.
TOLERANCE = {"auc": 2e-3}


def test_every_metric_has_an_oracle():
    assert set(EXPECTED) == set(metrics.METRICS)


PARTS = np.split(np.arange(N), [1, 30])


@functools.cache
def measured(name):
    """A metric of the uneven parts without weights and with them; with the last 41 masked; and without those at all."""
    metric = metrics.METRICS[name]

    def all_of_it(outputs, bad, target, weight):
        parts = [
            [metric(outputs[rows], target[rows], weight[rows] if weighted else None) for rows in PARTS]
            for weighted in (False, True)
        ]
        return *parts, metric(bad, target, jnp.asarray(np.arange(N) < 60)), metric(outputs[:60], target[:60], None)

    outputs, target, _ = EXPECTED[name]
    bad = outputs.copy()
    bad[60:] = np.nan
    return jax.device_get(jax.jit(all_of_it)(outputs, bad, target, WEIGHT))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_against_scikit_learn_in_uneven_batches(name, weighted):
    expected = EXPECTED[name][2](WEIGHT if weighted else None)
    got = metrics.compute(metrics.merge([{name: part} for part in measured(name)[weighted]]))[name]
    tolerance = TOLERANCE.get(name, 2e-6)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_mask_leaves_out_what_it_covers_even_nan(name):
    _, _, masked, plain = measured(name)
    np.testing.assert_allclose(
        np.asarray(masked.compute(), float), np.asarray(plain.compute(), float), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["confusion", "f1", "accuracy"])
def test_labels_of_few_bits_count_as_wide_ones(name):
    """uint8 holds the 21 classes, but not their 441 cells."""
    logits, target, metric = np.eye(21, dtype="float32"), np.arange(21), metrics.METRICS[name]
    run = jax.jit(lambda logits, *targets: [metric(logits, each, None) for each in targets])
    wide, narrow = jax.device_get(run(logits, target.astype("int32"), target.astype("uint8")))
    np.testing.assert_array_equal(wide.compute(), narrow.compute())


def test_mean_is_exact_beyond_the_integers_of_float32():
    part = {"x": metrics.Mean(np.float32(1), np.float32(2**24))}
    merged = metrics.merge([part] * 5)["x"]
    assert merged.weight == 5 * 2**24
    assert merged.total == 5


def test_a_weight_per_position_and_one_per_example():
    values = np.arange(6, dtype="float32").reshape(2, 3)
    weights = np.float32([1.0, 0.0]), np.array([[True, True, True], [False, False, False]])
    per_example, per_position = jax.jit(lambda x, *weights: [metrics.Mean.of(x, w) for w in weights])(values, *weights)
    assert float(per_example.compute()) == float(per_position.compute()) == 1.0
    assert float(per_example.weight) == float(per_position.weight) == 3.0


def test_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    accuracy = jax.jit(metrics.accuracy)
    alone = accuracy(LOGITS[:96], LABELS[:96], WEIGHT[:96] > 1)
    across = accuracy(*jax.device_put((LOGITS[:96], LABELS[:96], WEIGHT[:96] > 1), split))
    assert float(alone.total) == float(across.total)
    assert float(alone.weight) == float(across.weight)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigError, match="'acuracy'; did you mean 'accuracy'"):
        metrics.resolve("acuracy")


@pytest.mark.parametrize("name", ["mean_squared_error", "mean_absolute_error", "binary_accuracy", "r2", "auc"])
def test_a_column_against_a_vector_is_an_error_and_no_broadcast(name):
    with pytest.raises(DataError, match=r"\(4, 1\).*\(4,\)"):
        metrics.METRICS[name](np.zeros((4, 1), "f4"), np.zeros(4, "f4"))


def test_labels_of_a_wrong_shape_are_an_error():
    with pytest.raises(DataError, match=r"need class labels of shape \(4,\)"):
        metrics.accuracy(np.zeros((4, 3), "f4"), np.zeros((4, 1), "int32"))


def test_a_mask_of_a_wrong_shape_is_an_error():
    with pytest.raises(DataError, match="does not lead"):
        metrics.Mean.of(np.zeros((4, 3), "f4"), np.ones(3, "f4"))


def test_scalars_count_with_their_weight():
    assert metrics.compute({"x": metrics.as_metric(2.0, 3.0).merge(metrics.as_metric(6.0, 1.0))}) == {"x": 3.0}


def test_bfloat16_values_reach_the_host():
    assert metrics.compute(metrics.merge([{"x": jnp.bfloat16(1.5)}, {"x": jnp.bfloat16(2.5)}])) == {"x": 2.0}
