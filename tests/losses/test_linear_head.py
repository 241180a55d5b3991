"""The cross-entropy of a linear head: chunked against whole, on a mesh against one device, and as an objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import metrics as M
from sapwood.losses.classification import softmax_cross_entropy
from sapwood.losses.linear_head import linear_cross_entropy
from sapwood.models import Decoder
from sapwood.train.objectives.next_token import next_token

RANDOM = np.random.default_rng(0)


def arrays(batch=2, length=6, features=5, classes=7, dtype="float32"):
    x = RANDOM.standard_normal((batch, length, features))
    kernel, bias = RANDOM.standard_normal((features, classes)), RANDOM.standard_normal(classes)
    labels, weight = RANDOM.integers(0, classes, (batch, length)), RANDOM.integers(0, 3, (batch, length)) / 2
    return (*(a.astype(dtype) for a in (x, kernel, bias)), labels.astype("int32"), weight.astype("float32"))


def plain(x, kernel, bias, labels, weight):
    logits = (x @ kernel + bias).astype("float32")
    losses = softmax_cross_entropy(logits, labels)
    return jnp.sum(losses * weight), losses, jnp.argmax(logits, -1) == labels


@pytest.mark.parametrize("chunk", [1, 4, None])  # 4 does not divide the 6 positions; None takes all
def test_it_is_the_cross_entropy_of_the_logits(chunk):
    x, kernel, bias, labels, weight = arrays()

    def chunked(x, kernel, bias):
        out = linear_cross_entropy(x, kernel, labels, bias, weight, chunk=chunk)
        return 3 * out.total, out  # a factor, so that the cotangent is not 1

    def whole(x, kernel, bias):
        out = plain(x, kernel, bias, labels, weight)
        return 3 * out[0], out

    @jax.jit
    def all_of_them(*given):
        return chunked(*given)[0], *(jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*given) for f in (chunked, whole))

    # the first outside of a gradient
    without, ((ours, out), gradients), ((theirs, expected), right) = all_of_them(x, kernel, bias)
    np.testing.assert_allclose([without, ours], [theirs, theirs], rtol=1e-6)
    np.testing.assert_allclose(out.losses, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.hits, expected[2])
    for ours, theirs in zip(gradients, right, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_bias_and_weight():
    x, kernel, bias, labels, _ = arrays()
    total = jax.jit(lambda *given: linear_cross_entropy(*given).total)(x, kernel, labels)
    expected = jax.jit(plain)(x, kernel, 0 * bias, labels, np.ones(labels.shape, "float32"))
    np.testing.assert_allclose(total, expected[0], rtol=1e-6)


def test_what_weighs_nothing_does_not_count():
    x, kernel, bias, labels, weight = arrays()
    weight[0] = 0
    x[0] *= 1e30  # their losses are not finite
    run = lambda x: linear_cross_entropy(x, kernel, labels, bias, weight, chunk=2).total  # noqa: E731
    total, dx = jax.device_get(jax.jit(jax.value_and_grad(run))(x))
    assert np.isfinite(total)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(dx[0], 0)


def test_in_bfloat16_the_softmax_and_the_sums_are_float32():
    x, kernel, bias, labels, weight = arrays(batch=4, length=64, features=32, classes=50, dtype="bfloat16")
    wide = [a.astype("float32") for a in (x, kernel, bias)]
    run = lambda x, k, b: linear_cross_entropy(x, k, labels, b, weight, chunk=8).total  # noqa: E731
    ours, gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(x, kernel, bias)
    theirs, right = jax.jit(jax.value_and_grad(lambda *a: plain(*a, labels, weight)[0], (0, 1, 2)))(*wide)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(gradients, right, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype("float32"), theirs, rtol=0.03, atol=0.03 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("mesh", "spec", "features"),
    [
        ("data=4,fsdp=2", (("data", "fsdp"), None, None), 16),
        ("data=4,fsdp=2", (("data", "fsdp"), None, None), 5),  # which 8 shards do not divide
        ("fsdp=2,sequence=2,tensor=2", ("fsdp", "sequence", "tensor"), 16),
        ("sequence=2,tensor=4", (None, None, ("sequence", "tensor")), 5),
    ],
)
def test_on_a_mesh_it_is_the_same(mesh, spec, features):
    x, kernel, bias, labels, weight = arrays(batch=8, features=features, classes=8)
    x[3], bias[4:] = 0, bias[:4]  # classes as likely as others: the first counts
    sharding = NamedSharding(sw.mesh(mesh), PartitionSpec(*spec))

    def run(sharding):
        def total(x, kernel, bias):
            out = linear_cross_entropy(x, kernel, labels, bias, weight, chunk=2, sharding=sharding)
            return 2 * out.total, (out.losses, out.hits)

        return jax.block_until_ready(jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(x, kernel, bias))

    for ours, theirs in zip(*(jax.tree.leaves(run(s)) for s in (sharding, None)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_chunk_gathers_the_batch_and_the_shards_meet_once():
    x, kernel, _, labels, _ = arrays(batch=8, length=64, features=16, classes=8)
    sharding = NamedSharding(sw.mesh("data=8"), PartitionSpec("data", None, None))

    def total(x, kernel):
        return linear_cross_entropy(x, kernel, labels, chunk=8, sharding=sharding).total

    compiled = jax.jit(jax.grad(total, (0, 1)), in_shardings=(sharding, None)).lower(x, kernel).compile().as_text()
    loop = next(part for part in compiled.split("\n\n") if "%while_body" in part or "region_0" in part.split("(")[0])
    assert "all-" not in loop
    assert "reduce-scatter" in compiled or "all-reduce" in compiled


def test_the_logits_are_never_whole_in_memory():
    x, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((4, 256, 8), (8, 4096)))
    labels = np.zeros((4, 256), int)
    total = lambda x, kernel: linear_cross_entropy(x, kernel, labels, chunk=16).total  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(x, kernel).compile()
    logits = 4 * 256 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4  # a chunk's logits and its softmax: an eighth


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("data",), "2 examples do not divide over 4 devices of mesh axis data; take 4"),
        ((None, "data"), "6 positions do not divide over 4 devices of mesh axis data; take 8"),
        ((None, None, "tensor"), "7 classes do not divide over 2 devices of mesh axis tensor; take 8, or leave"),
    ],
)
def test_what_the_mesh_does_not_divide(spec, message):
    x, kernel, _, labels, _ = arrays()
    sharding = NamedSharding(jax.sharding.AbstractMesh((4, 2), ("data", "tensor")), PartitionSpec(*spec))
    with pytest.raises(sw.DataError, match=message):
        linear_cross_entropy(x, kernel, labels, sharding=sharding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((2, 5), "f4")}, r"expects x \(batch, length, features\).* got \(2, 5\), \(5, 7\), \(2, 6\)"),
        ({"labels": np.ones((2, 5), int)}, r"labels \(batch, length\), got"),
        ({"kernel": np.ones((4, 7), "f4")}, "expects x"),
        ({"bias": np.ones(6, "f4")}, r"bias \(classes,\)"),
        ({"weight": np.ones(2, "f4")}, r"weight \(batch, length\)"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    x, kernel, bias, labels, weight = arrays()
    given = {"x": x, "kernel": kernel, "labels": labels, "bias": bias, "weight": weight, **change}
    with pytest.raises(sw.DataError, match=message):
        linear_cross_entropy(**given)


class Bigram(sw.Layer):
    """The ends of a language model, and nothing between."""

    vocabulary: int

    def __call__(self, v, tokens):
        return self.features(v, tokens) @ self.head(v)[0]

    def features(self, v, tokens):
        return sw.layers.Embed(self.vocabulary, 8)(v.embed, tokens)

    def head(self, v):
        return v.logits.param("kernel", (8, self.vocabulary), jax.nn.initializers.lecun_normal()), None


@pytest.mark.parametrize(
    ("extra", "model"),
    [
        ({}, Decoder(vocabulary=11, depth=1, width=8, heads=2, bias=True)),
        ({"mask": np.array([True, False])}, Bigram(11)),
        ({"weight": np.array([0.5, 2.0], "float32")}, Bigram(11)),
    ],
    ids=["a decoder with bias", "mask", "weight"],
)
@pytest.mark.costs("two objectives of a whole decoder, and their gradients, are compiled")
def test_the_objective_is_the_supervised_one(extra, model):
    tokens = RANDOM.integers(0, 11, (2, 2, 6)).astype("int32")
    batch = {"tokens": tokens[0], "targets": tokens[1], **extra}
    objectives = next_token(model), sw.supervised(model, inputs="tokens", target="targets")
    params, _ = sw.init(objectives[0], 0, batch)

    def run(objective, params):
        return jax.value_and_grad(lambda params: sw.apply(objective, params, {}, batch)[0], has_aux=True)(params)

    both = jax.jit(lambda params: [run(objective, params) for objective in objectives])(params)
    ours, theirs = ((loss, M.compute(metrics), gradients) for (loss, metrics), gradients in both)
    assert ours[1].keys() == theirs[1].keys()
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_bytes_are_labels_of_256_classes_and_more():
    x, kernel, bias, labels, weight = arrays(classes=600)
    labels = labels % 256
    run = jax.jit(linear_cross_entropy)
    wide, narrow = (run(x, kernel, y, bias, weight) for y in (labels, labels.astype("uint8")))
    np.testing.assert_array_equal(wide.losses, narrow.losses)
    batch = {"tokens": np.zeros((2, 3), "int32"), "targets": np.array([[0, 9, 255]] * 2, "uint8")}
    model = Bigram(256)
    params, _ = sw.init(model, 0, batch["tokens"])
    assert np.isfinite(sw.apply(next_token(model), params, {}, batch)[0][0])


def test_a_token_outside_the_vocabulary_is_reported():
    model = Bigram(5)
    batch = {"tokens": np.zeros((2, 3), "int32"), "targets": np.array([[0, 1, 2], [0, 5, 2]], "int32")}
    params, _ = sw.init(model, 0, batch["tokens"])
    with pytest.raises(sw.CheckError, match="target outside the 5 tokens 0 to 4"):
        sw.apply(next_token(model), params, {}, batch)
    for counts in ({"mask": np.array([True, False])}, {"weight": np.float32([1, 0])}):
        assert np.isfinite(sw.apply(next_token(model), params, {}, {**batch, **counts})[0][0])


def test_a_model_without_the_two_halves():
    with pytest.raises(sw.ConfigError, match=r"features\(v, tokens\) and head\(v\).*got Dense"):
        next_token(sw.layers.Dense(3))
