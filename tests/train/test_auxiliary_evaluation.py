"""Auxiliary losses in evaluation: reported as in training, and exact where the last batch is not full."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import sapwood as sw
from sapwood import layers as L
from sapwood import metrics as M
from sapwood.parallel import DEFAULT
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.train import Trainer, supervised

RANDOM = np.random.default_rng(0)
DATA = {"x": RANDOM.normal(size=(11, 4)).astype("float32"), "label": (np.arange(11) % 3).astype("int32")}


def model(v, x):
    """A mean over the examples, and what depends on none of them."""
    kernel = v.param("kernel", (4, 3), jax.nn.initializers.normal(1.0))
    v.loss("activity", jnp.mean((x @ kernel) ** 2))
    v.loss("l2", 0.5 * jnp.sum(kernel**2))
    return x @ kernel


def trainer(**options):
    return Trainer(supervised(model, inputs="x"), optax.sgd(0.0), **options)


@pytest.mark.parametrize(("mesh", "batch_size"), [(None, 4), (None, 16), ("data=4,tensor=2", 8)])
def test_padding_does_not_count(mesh, batch_size):
    """11 examples are batches of 4, 4 and 3; one of 11; of 8 and 3, which 4 shards do not divide."""
    one = trainer(mesh=None if mesh is None else sw.mesh(mesh, devices=jax.devices()))
    state = one.init(0, {name: x[:8] for name, x in DATA.items()})
    found = one.evaluate(state, DATA, batch_size)
    kernel = np.asarray(state.params["kernel"], "float64")
    expected = np.mean((DATA["x"] @ kernel) ** 2) + 0.5 * np.sum(kernel**2)
    np.testing.assert_allclose(found["auxiliary_loss"], expected, rtol=1e-6)
    logits = DATA["x"] @ kernel
    losses = special.logsumexp(logits, axis=1) - logits[np.arange(11), DATA["label"]]
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-5)


def test_a_batch_gives_the_same_in_training_and_in_evaluation():
    one, batch = trainer(), {name: x[:8] for name, x in DATA.items()}
    state = one.init(0, batch)
    _, metrics = jax.jit(one.step)(state, batch)
    trained, found = M.compute(metrics), one.evaluate(state, batch, 8)
    for name in ("loss", "auxiliary_loss"):
        np.testing.assert_allclose(found[name], trained[name], rtol=1e-6)


def deep(v, x):
    """A stack, which stages cut into a pipeline, and means over the examples inside of it and outside."""

    def block(v, x):
        h = v.shard(jnp.tanh(L.Dense(8)(v.up, x)), "batch", "mlp")
        v.loss("size", jnp.mean(h**2))
        return x + h

    x = L.Scan(block, 4)(v.blocks, v.shard(L.Dense(8)(v.stem, x), "batch", "embed"))
    v.loss("activity", jnp.mean(v.shard(x, "batch", "embed") ** 2))
    return L.Dense(3)(v.head, x)


@functools.cache
def evaluated(mesh=None, rules=None):
    one = Trainer(supervised(deep, inputs="x"), optax.sgd(0.0), mesh=mesh, rules=rules)
    return one.evaluate(one.init(0, {name: x[:8] for name, x in DATA.items()}), DATA, 8)


@pytest.mark.costs("a pipeline, and what it leaves over, are compiled for eight devices")
@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("stage=4,data=2", {}),
        ("stage=2,data=4", {"pipeline": Pipeline(schedule="1f1b"), "strict": True}),
        ("data=8", {"strict": True}),
    ],
)
def test_the_last_examples_need_not_divide_over_the_mesh(mesh, rules):
    """11 examples are a batch of 8 and one of 3: too few for four stages, refused by strict rules."""
    found = evaluated(mesh, dataclasses.replace(DEFAULT, **rules))
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in evaluated().items()}


def sized(v, x):
    w = v.param("w", (1, 1), jax.nn.initializers.ones)
    v.loss("size", jnp.mean((x @ w) ** 2))
    return (x @ w)[:, 0]


def of_tokens(v, batch):
    each = (sized(v, batch["x"]) - batch["label"])[:, None] ** 2
    return M.Mean.of(jnp.broadcast_to(each, batch["tokens"].shape), batch["tokens"]), {}


X, WEIGHT = np.float32([1, 1, 3, 3]), np.float32([1, 0, 9, 9])
TOKENS = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0]], bool)
OTHERS = {"x": X[:, None], "label": np.float32([2, 5, 1, 0]), "weight": WEIGHT, "tokens": TOKENS}
LOSSES = [(supervised(sized, "squared_error", inputs="x"), WEIGHT), (of_tokens, TOKENS.sum(1))]


@pytest.mark.costs("four small programs each: evaluation, what is left over, and two of micro-batches")
@pytest.mark.parametrize(("objective", "weight"), LOSSES, ids=["weights", "tokens"])
def test_what_layers_add_counts_by_examples_whatever_the_loss_counts_by(objective, weight):
    """Both parts of the gradient, in NumPy, of the whole batch and of micro-batches, some of which weigh nothing."""
    loss, auxiliary = np.average((X - OTHERS["label"]) ** 2, weights=weight), np.mean(X**2)
    gradient = np.average(2 * X * (X - OTHERS["label"]), weights=weight) + 2 * auxiliary
    one = Trainer(objective, optax.sgd(1.0))
    state = one.init(0, OTHERS)
    for size in (3, 1):  # 3 and 1 examples; one at a time
        found = one.evaluate(state, OTHERS, size)
        np.testing.assert_allclose([found["loss"], found["auxiliary_loss"]], [loss, auxiliary], rtol=1e-6)
    for n in (2, 4):
        after, metrics = jax.jit(dataclasses.replace(one, accumulate=n).step)(state, OTHERS)
        found = M.compute(metrics)
        np.testing.assert_allclose(after.params["w"][0, 0], 1 - gradient, rtol=1e-6)
        np.testing.assert_allclose([found["loss"], found["auxiliary_loss"]], [loss, auxiliary], rtol=1e-6)
