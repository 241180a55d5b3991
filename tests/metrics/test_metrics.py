"""Metrics against scikit-learn, over batches cut unevenly, masked, and on eight devices."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as oracle
from scipy import special

from sapwood import ConfigError, DataError, bind, losses, metrics
from sapwood.core import migration_hints
from sapwood.metrics import registry
from sapwood.metrics.precision_recall import tally
from sapwood.train.optimizers import learning_rate
from sapwood.train.step import checks, forward

RNG = np.random.default_rng(0)
N, C = 102, 7
LOGITS = RNG.normal(size=(N, C)).astype("float32")
LABELS = RNG.integers(0, C, N).astype("int32")
WEIGHT = RNG.uniform(0.1, 2, N).astype("float32")
BINARY = RNG.integers(0, 2, N).astype("int32")
SCORE = (RNG.normal(size=N) + BINARY).astype("float32")
TARGET = (2 * SCORE + RNG.normal(size=N)).astype("float32")
PREDICTED = LOGITS.argmax(1)

FEW = np.array([0, 1, 2, 2, 1, 2, 0])[LABELS] * 4  # classes 0, 4 and 8 of 12
WIDE = (
    np.where(np.arange(12) % 2 == 0, RNG.normal(size=(N, 12)), -9).astype("float32") + 2 * np.eye(12, dtype="f4")[FEW]
)
SOFT = RNG.dirichlet(np.ones(C), N).astype("float32")
BITS = (RNG.uniform(size=(N, 4)) < [0.5, 0.3, 0.05, 0]).astype("int32")  # the last label is never there
SCORES = (RNG.normal(size=(N, 4)) + BITS - [0.5, 0.5, 0.5, 9]).astype("float32")  # nor predicted
FAR = (20000 + SCORE + RNG.normal(size=N)).astype("float32")
OUTPUTS, TARGETS = (
    np.stack(x, 1) for x in ((FAR, SCORE, LOGITS[:, 0]), (FAR + LOGITS[:, 1], TARGET, np.full(N, 7.0, "f4")))
)


def macro(score, y, chosen, **options):
    return lambda w: score(y, chosen, sample_weight=w, **{"average": "macro", "zero_division": 0, **options})


def roc(y, score, **options):
    return lambda w: oracle.roc_auc_score(y, score, sample_weight=w, **options)


M, P = metrics, functools.partial
CASES = {  # the metric, outputs, target, and scikit-learn's value under weights
    "accuracy": (M.accuracy, LOGITS, LABELS, lambda w: oracle.accuracy_score(LABELS, PREDICTED, sample_weight=w)),
    "top_5_accuracy": (M.top_5_accuracy, LOGITS, LABELS, lambda w: oracle.top_k_accuracy_score(
        LABELS, LOGITS, k=5, sample_weight=w, labels=range(C))),
    "perplexity": (M.perplexity, LOGITS, LABELS, lambda w: np.exp(oracle.log_loss(
        LABELS, special.softmax(LOGITS.astype(float), 1), sample_weight=w, labels=range(C)))),
    "perplexity, soft": (M.perplexity, LOGITS, SOFT, lambda w: np.exp(np.average(
        -(SOFT * special.log_softmax(LOGITS.astype(float), 1)).sum(1), weights=w))),
    "confusion": (M.confusion, LOGITS, LABELS, lambda w: oracle.confusion_matrix(LABELS, PREDICTED, sample_weight=w)),
    "precision": (M.precision, WIDE, FEW, macro(oracle.precision_score, FEW, WIDE.argmax(1))),
    "recall": (M.recall, WIDE, FEW, macro(oracle.recall_score, FEW, WIDE.argmax(1))),
    "f1": (M.f1, WIDE, FEW, macro(oracle.f1_score, FEW, WIDE.argmax(1))),
    "f1, micro": (P(M.f1, average="micro"), WIDE, FEW, macro(oracle.f1_score, FEW, WIDE.argmax(1), average="micro")),
    "precision, weighted": (P(M.precision, average="weighted"), WIDE, FEW, macro(
        oracle.precision_score, FEW, WIDE.argmax(1), average="weighted")),
    "recall, each": (P(M.recall, average=None), WIDE, FEW, macro(
        oracle.recall_score, FEW, WIDE.argmax(1), average=None, labels=range(12))),
    "binary_accuracy": (M.binary_accuracy, SCORE, BINARY, lambda w: oracle.accuracy_score(
        BINARY, SCORE > 0, sample_weight=w)),
    "binary_accuracy, labels": (M.binary_accuracy, SCORES, BITS, lambda w: 1 - oracle.hamming_loss(
        BITS, SCORES > 0, sample_weight=w)),
    "subset_accuracy": (M.subset_accuracy, SCORES, BITS, lambda w: oracle.accuracy_score(
        BITS, SCORES > 0, sample_weight=w)),
    "binary_precision": (M.binary_precision, SCORE[:, None], BINARY[:, None], macro(
        oracle.precision_score, BINARY, SCORE > 0, average="binary")),
    "binary_recall": (P(M.binary_recall, threshold=0.7), SCORE, 2 * BINARY - 1, macro(
        oracle.recall_score, BINARY, special.expit(SCORE) > 0.7, average="binary")),
    "binary_f1": (M.binary_f1, SCORES, BITS, macro(oracle.f1_score, BITS, SCORES > 0)),
    "binary_precision, labels": (M.binary_precision, SCORES, BITS, macro(oracle.precision_score, BITS, SCORES > 0)),
    "binary_f1, micro": (P(M.binary_f1, average="micro", threshold=0.3), SCORES, BITS, macro(
        oracle.f1_score, BITS, special.expit(SCORES) > 0.3, average="micro")),
    "binary_recall, weighted": (P(M.binary_recall, average="weighted"), SCORES, BITS.astype(bool), macro(
        oracle.recall_score, BITS, SCORES > 0, average="weighted")),
    "binary_f1, each": (P(M.binary_f1, average=None), SCORES, BITS.astype("f4"), macro(
        oracle.f1_score, BITS, SCORES > 0, average=None)),
    "auc": (M.auc, SCORE * 3 + 12, BINARY, roc(BINARY, SCORE)),  # as logits all of them are certain
    "auc, ties": (M.auc, np.round(SCORE), BINARY, roc(BINARY, np.round(SCORE))),
    "auc, labels": (M.auc, SCORES[:, :3], BITS[:, :3], roc(BITS[:, :3], SCORES[:, :3])),
    "auc, micro": (P(M.auc, average="micro"), SCORES, BITS, roc(BITS, SCORES, average="micro")),
    "auc, weighted": (P(M.auc, average="weighted"), SCORES, BITS, roc(BITS, SCORES, average="weighted")),
    "auc, each": (P(M.auc, average=None), SCORES[:, :3], BITS[:, :3], roc(BITS[:, :3], SCORES[:, :3], average=None)),
    "mean_squared_error": (M.mean_squared_error, SCORE, TARGET, lambda w: oracle.mean_squared_error(
        TARGET, SCORE, sample_weight=w)),
    "mean_absolute_error": (M.mean_absolute_error, OUTPUTS, TARGETS, lambda w: oracle.mean_absolute_error(
        TARGETS, OUTPUTS, sample_weight=w)),
    "root_mean_squared_error": (M.root_mean_squared_error, OUTPUTS, TARGETS, lambda w: oracle.root_mean_squared_error(
        TARGETS, OUTPUTS, sample_weight=w)),
    "r2": (M.r2, SCORE, TARGET, lambda w: oracle.r2_score(TARGET, SCORE, sample_weight=w)),
    "r2 far from zero": (M.r2, np.sort(FAR) + 0.5, np.sort(FAR), lambda w: oracle.r2_score(
        np.sort(FAR).astype(float), np.sort(FAR).astype(float) + 0.5, sample_weight=w)),
    "r2 of outputs": (M.r2, OUTPUTS, TARGETS, lambda w: oracle.r2_score(
        TARGETS.astype(float), OUTPUTS.astype(float), sample_weight=w)),
    "r2 of a constant": (M.r2, np.full(N, 7.1, "f4"), np.full(N, 7.1, "f4"), lambda w: 1.0),
}  # fmt: skip


def test_every_metric_has_an_oracle():
    assert {metrics.plain(metric).__name__ for metric, *_ in CASES.values()} == set(metrics.METRICS)


SOME = np.where(np.arange(N) < 60, WEIGHT, 0)  # what weighs nothing is NaN


@functools.cache
def measured():
    """Each metric of three parts: without weights, and under weights that are 0 in half of the second and in the third.
    Those with options under a mask of these. All by one program."""

    def all_of_it(given, some):
        return {name: one(name, CASES[name][0], *arrays, some) for name, arrays in given.items()}

    def one(name, metric, outputs, bad, target, some):
        if "," in name:
            return {"masked": jax.vmap(metric)(bad, target, some > 0)}
        found = {"plain": jax.vmap(metric)(outputs, target), "weighted": jax.vmap(metric)(bad, target, some)}
        if type(found["plain"]).merge is not metrics.Metric.merge:
            parts = [jax.tree.map(operator.itemgetter(i), found["weighted"]) for i in range(3)]
            merged = functools.reduce(lambda one, two: one.merge(two), parts)
            found["merged"] = jax.tree.map(lambda x: x[None], merged)
        return found

    parts = {}
    for name, (_, outputs, target, _) in CASES.items():
        bad = outputs.copy()
        bad[60:] = np.nan
        parts[name] = [x.reshape(3, N // 3, *x.shape[1:]) for x in (outputs, bad, target)]
    return jax.device_get(jax.jit(all_of_it)(parts, SOME.reshape(3, -1)))


@pytest.mark.costs("one program of every metric")
@pytest.mark.filterwarnings("ignore:Only one class is present")
@pytest.mark.parametrize("name", CASES)
def test_against_scikit_learn_in_batches(name):
    """Merged on the host, and once on the device, in float32, as gradient accumulation does."""
    weights = {"plain": None, "weighted": SOME, "merged": SOME, "masked": SOME > 0}
    for how, parts in measured()[name].items():
        got = metrics.compute(metrics.merge_stacked({name: parts}))[name]
        expected, tolerance = CASES[name][3](weights[how]), 1e-5 if how == "merged" else 2e-6
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=how)


def test_the_area_of_many_scores_on_the_device():
    """Pairs of a positive and a negative are more than int32 counts, and sums of weights more than float32 does."""
    n = 200_000
    rng = np.random.default_rng(2)
    positive, weight = np.arange(n) % 2, rng.integers(1, 200, n).astype("int32")
    score = (positive + rng.normal(size=n)).astype("float32").round(3)  # many are equal
    for w in (None, weight):
        expected = oracle.roc_auc_score(positive, score, sample_weight=w)
        area = metrics.auc(*(None if x is None else jnp.asarray(x) for x in (score, positive, w)))
        for found in (area, jax.device_get(area)):
            assert metrics.compute({"auc": found})["auc"] == pytest.approx(expected, abs=1e-5)


def test_batches_of_uneven_size_merge_too():
    score, positive = np.float32([3, 1, 2, 0, 5]), np.array([1, 0, 1, 0, 0], bool)
    parts = [metrics.AUC(score[rows, None], positive[rows, None], None) for rows in np.split(np.arange(5), [1, 3])]
    expected = oracle.roc_auc_score(positive, score)
    assert metrics.compute(metrics.merge([{"auc": part} for part in parts])) == {"auc": pytest.approx(expected)}


@pytest.mark.parametrize("name", ["confusion", "f1", "accuracy"])
def test_labels_of_few_bits_count_as_wide_ones(name):
    """uint8 holds the 21 classes, but not their 441 cells."""
    logits, target, metric = np.eye(21, dtype="float32"), np.arange(21), metrics.METRICS[name]
    run = jax.jit(lambda logits, *targets: [metric(logits, each, None) for each in targets])
    wide, narrow = jax.device_get(run(logits, target.astype("int32"), target.astype("uint8")))
    np.testing.assert_array_equal(wide.compute(), narrow.compute())


def test_large_counts_are_exact_and_large_sums_of_weights_close():
    n = 2**20
    weight = np.random.default_rng(1).uniform(size=n).astype("float32")
    index = (np.arange(n) % 8 == 0).astype("int32")
    counts, masked, sums = jax.jit(lambda i, m, w: (tally(i, 2, None), tally(i, 2, m), tally(i, 2, w)))(
        index, weight < 0.5, weight
    )
    assert counts.dtype == masked.dtype == jnp.int32  # a float32 stops counting at 2**24
    np.testing.assert_array_equal(masked, np.bincount(index, weight < 0.5))
    np.testing.assert_allclose(sums, np.bincount(index, weight.astype(float)), rtol=1e-6)


def test_labels_outside_the_classes_are_misses_and_have_no_perplexity():
    logits, target = np.eye(3, dtype="f4")[[0, 1, 2, 0]], np.int32([0, 1, 3, -1])
    run = jax.jit(
        lambda *xs: [metrics.METRICS[name](*xs) for name in ("accuracy", "confusion", "recall", "perplexity")]
    )
    accuracy, confusion, recall, perplexity = (x.compute() for x in jax.device_get(run(logits, target)))
    assert accuracy == 0.5
    np.testing.assert_array_equal(confusion, np.diag([1, 1, 0]))
    assert recall == pytest.approx(2 / 3)  # class 2 was predicted and never there
    assert np.isnan(perplexity)


def test_nothing_counted_is_no_number():
    some = np.zeros(2)
    empty = (
        metrics.Mean(some, some),
        metrics.F1(some, some, some),
        metrics.R2(*[some] * 5),
        metrics.RootMean(some, some),
    )
    auc = metrics.AUC(np.zeros((2, 1)), np.array([[True], [False]]), np.zeros((2, 1), bool))
    assert all(np.isnan(metric.compute()).all() for metric in (*empty, auc))


REFUSED = [
    ((4, 1), (4, 1), "f4"), ((4,), (4,), "f4"), ((4, 3), (4, 3), "i4"), ((4, 1), (4,), "i4"), ((4, 3), (4,), "f4"),
    ((4, 3), (4, 1), "i4"), ((4, 3), (4, 2), "f4"),
]  # fmt: skip


@pytest.mark.parametrize("metric", metrics.KINDS["classes"], ids=lambda metric: metric.__name__)
def test_metrics_of_classes_refuse_what_is_no_class(metric):
    for outputs, target, dtype in REFUSED:
        with pytest.raises(DataError, match=r"no choice between classes.*binary_accuracy.*mean_absolute_error"):
            jax.eval_shape(metric, np.zeros(outputs, "f4"), np.zeros(target, dtype))


def test_options_that_are_not_there():
    outputs, bits = np.zeros(4, "f4"), np.zeros(4, "i4")
    with pytest.raises(ConfigError, match=r"precision\(average='mean'\): one of 'macro', 'micro', 'weighted', None"):
        metrics.precision(np.zeros((4, 3), "f4"), bits, average="mean")
    with pytest.raises(ConfigError, match=r"auc\(average='samples'\)"):
        metrics.auc(outputs, bits, average="samples")
    with pytest.raises(ConfigError, match=r"binary_f1\(threshold=50\): a probability between 0 and 1"):
        metrics.binary_f1(outputs, bits, threshold=50)


def test_mean_is_exact_beyond_the_integers_of_float32():
    part = {"x": metrics.Mean(np.float32(1), np.float32(2**24))}
    merged = metrics.merge([part] * 5)["x"]
    assert merged.weight == 5 * 2**24
    assert merged.total == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "int32"])
def test_weights_of_few_bits_sum_to_what_they_are(dtype):
    """4099 is no float16 and no bfloat16."""
    ones = jnp.ones(4099, "int32")
    found = metrics.binary_recall(ones, ones, ones.astype(dtype))
    assert float(found.hit[0]) == float(found.actual[0]) == 4099
    assert float(metrics.Mean.of(ones, ones.astype(dtype)).total) == 4099


@pytest.mark.parametrize("switch", ["dtypes", "ranks"])
@pytest.mark.parametrize("kind", metrics.KINDS)
def test_every_loss_and_metric_under_the_switches_of_jax(kind, switch):
    """Whatever type targets and weights have: a switch refuses while a program is traced."""
    shapes = {"classes": [(6, 3)], "binary labels": [(6,), (6, 3)], "numbers": [(6,), (6, 3)]}[kind]
    one = {"int32": "uint8", "uint8": "float16", "bool": "bool", "float16": "int32", "float32": "float32"}

    def value(metric, outputs, target, weight):
        losses_, known = losses.KINDS[kind], outputs.shape == target.shape
        each = [loss(outputs, target) for loss in losses_ if known or loss is not losses.kl_divergence]
        weight = losses.example_weight({"mask": weight, "weight": weight.astype("float32")})
        for loss in losses_:
            losses.check(bind({}), loss, outputs, target, weight, {kind})
        found = metric(outputs, target, weight)
        return found.merge(found).compute(), found.compute(), [losses.reduce(loss, weight) for loss in each]

    with jax.numpy_dtype_promotion("strict") if switch == "dtypes" else jax.numpy_rank_promotion("raise"):
        for i, metric in enumerate(metrics.KINDS[kind]):
            dtype = list(one)[i % len(one)]
            for shape in shapes:
                target = shape if kind != "classes" or "float" in dtype else shape[:-1]
                arrays = zip((shape, target, (6,)), ("bfloat16", dtype, one[dtype]), strict=True)
                jax.eval_shape(P(value, metric), *(jax.ShapeDtypeStruct(*x) for x in arrays))


def test_a_weight_per_position_and_one_per_example():
    values = np.arange(6, dtype="float32").reshape(2, 3)
    weights = np.float32([1.0, 0.0]), np.array([[True, True, True], [False, False, False]])
    per_example, per_position = jax.jit(lambda x, *weights: [metrics.Mean.of(x, w) for w in weights])(values, *weights)
    assert float(per_example.compute()) == float(per_position.compute()) == 1.0
    assert float(per_example.weight) == float(per_position.weight) == 3.0


def test_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["data"], []))
    given = [x[:96] for x in (LOGITS, LABELS, SCORE, BINARY, FAR)]

    def some(logits, labels, score, binary, far):
        return metrics.f1(logits, labels), metrics.auc(score, binary), metrics.r2(far + score / 2, far)

    found = jax.device_get(jax.jit(some, out_shardings=whole)(*jax.device_put(given, split)))
    _, labels, score, binary, far = given
    expected = [oracle.f1_score(labels, PREDICTED[:96], average="macro"), oracle.roc_auc_score(binary, score),
                oracle.r2_score(far.astype(float), far.astype(float) + score / 2)]  # fmt: skip
    # far + score / 2 is rounded to float32, in steps of 0.002
    np.testing.assert_allclose([float(x.compute()) for x in found], expected, rtol=1e-3)


def test_the_page_lists_every_loss_and_metric_in_its_row(root):
    rows = (root / "docs" / "metrics.md").read_text(encoding="utf-8").split("\n|---|---|---|\n")[1].splitlines()[:3]
    for row, (kind, of_kind) in zip(rows, metrics.KINDS.items(), strict=True):
        _, losses_, metrics_ = row.strip("|").split("|")
        assert row.startswith(f"| **{kind}**")
        assert {name for name in losses.LOSSES if f"`{name}`" in losses_} == {x.__name__ for x in losses.KINDS[kind]}
        assert metrics_.replace("`", "").strip().split(", ")[0] == registry.DEFAULT[kind]
        assert set(metrics_.replace("`", "").strip().split(", ")) == {x.__name__ for x in of_kind}


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigError, match="'acuracy'; did you mean 'accuracy'"):
        metrics.resolve("acuracy")
    with pytest.raises(ConfigError, match="'mae': here it is \"mean_absolute_error\""):
        metrics.resolve("mae")
    assert {code.strip('"') for code, *_ in migration_hints.METRICS.values() if code} <= set(metrics.METRICS)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [(["f1", P(M.f1, average="micro")], r"two metrics are called 'f1'; name them, as in metrics=\{'f1_1'"),
     ({"step": "f1"}, "'step', which is a column of its own"), ({"loss": "f1"}, "'loss'"),
     ({"skipped_steps": "f1"}, "'skipped_steps'"),
     ({"validation_f1": "f1"}, "'validation_f1'"), ({3: "f1"}, "named by a string, got 3")],
)  # fmt: skip
def test_a_name_is_of_one_column_only(chosen, message):
    with pytest.raises(ConfigError, match=message):
        metrics.resolve_all(chosen)


def test_names_of_columns_are_those_that_fit_writes():
    assert {forward.AUXILIARY, checks.FLAGS, learning_rate.NAME, learning_rate.SCALE} <= set(registry.TAKEN)


@pytest.mark.parametrize(
    "name", [metric.__name__ for kind in ("binary labels", "numbers") for metric in metrics.KINDS[kind]]
)
def test_a_column_against_a_vector_is_an_error_and_no_broadcast(name):
    with pytest.raises(DataError, match=r"\(4, 1\).*\(4,\)"):
        metrics.METRICS[name](np.zeros((4, 1), "f4"), np.zeros(4, "f4"))


def test_a_mask_of_a_wrong_shape_is_an_error():
    with pytest.raises(DataError, match="does not lead"):
        metrics.Mean.of(np.zeros((4, 3), "f4"), np.ones(3, "f4"))


def test_scalars_count_with_their_weight():
    assert metrics.compute({"x": metrics.as_metric(2.0, 3.0).merge(metrics.as_metric(6.0, 1.0))}) == {"x": 3.0}


def test_bfloat16_values_reach_the_host():
    assert metrics.compute(metrics.merge([{"x": jnp.bfloat16(1.5)}, {"x": jnp.bfloat16(2.5)}])) == {"x": 2.0}
