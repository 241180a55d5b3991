"""Losses against PyTorch, forward and gradient, in float32 whatever comes in."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import CheckError, ConfigError, DataError
from sapwood.train import losses

torch = pytest.importorskip("torch")  # PyTorch comes with gigabytes of CUDA from the index; not in the extra `test`
F = torch.nn.functional

RNG = np.random.default_rng(1)
LOGITS = RNG.normal(size=(6, 5)).astype("float32") * 3
LABELS = np.array([0, 4, 2, 2, 1, 3], "int32")
SOFT = RNG.dirichlet(np.ones(5), 6).astype("float32")
X, Y = RNG.normal(size=(2, 6, 5)).astype("float32") * 2
BITS = RNG.integers(0, 2, (6, 5)).astype("float32")
LONG = torch.tensor(LABELS).long()


def _focal(x, gamma=2.0):
    y = torch.tensor(BITS)
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    return F.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_t) ** gamma


CASES = {
    "labels": (losses.softmax_cross_entropy, LOGITS, LABELS, lambda x: F.cross_entropy(x, LONG, reduction="none")),
    "smooth": (
        partial(losses.softmax_cross_entropy, label_smoothing=0.1), LOGITS, LABELS,
        lambda x: F.cross_entropy(x, LONG, reduction="none", label_smoothing=0.1)),
    "soft": (
        losses.softmax_cross_entropy, LOGITS, SOFT, lambda x: F.cross_entropy(x, torch.tensor(SOFT), reduction="none")),
    "sigmoid": (
        losses.sigmoid_cross_entropy, X, BITS,
        lambda x: F.binary_cross_entropy_with_logits(x, torch.tensor(BITS), reduction="none")),
    "focal": (losses.focal, X, BITS, _focal),
    "squared": (losses.squared_error, X, Y, lambda x: F.mse_loss(x, torch.tensor(Y), reduction="none")),
    "absolute": (losses.absolute_error, X, Y, lambda x: F.l1_loss(x, torch.tensor(Y), reduction="none")),
    "huber": (
        partial(losses.huber, delta=0.7), X, Y,
        lambda x: F.huber_loss(x, torch.tensor(Y), reduction="none", delta=0.7)),
    "log_cosh": (losses.log_cosh, X, Y, lambda x: torch.log(torch.cosh(x - torch.tensor(Y)))),
    "hinge": (losses.hinge, X, 2 * BITS - 1, lambda x: F.relu(1 - x * torch.tensor(2 * BITS - 1))),
    "kl": (
        losses.kl_divergence, np.log(SOFT[::-1].copy()), SOFT,
        lambda x: F.kl_div(x, torch.tensor(SOFT), reduction="none").sum(-1)),
    "cosine": (losses.cosine_distance, X, Y, lambda x: 1 - F.cosine_similarity(x, torch.tensor(Y))),
}  # fmt: skip


def test_every_loss_has_an_oracle():
    tested = {getattr(loss, "func", loss).__name__ for loss, *_ in CASES.values()}
    assert tested == set(losses.LOSSES)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_pytorch(name):
    loss, x, y, expected = CASES[name]
    tensor = torch.tensor(x, requires_grad=True)
    reference = expected(tensor)
    reference.sum().backward()
    value = loss(jnp.asarray(x), jnp.asarray(y))
    gradient = jax.grad(lambda x: loss(x, jnp.asarray(y)).sum())(jnp.asarray(x))
    np.testing.assert_allclose(value, reference.detach(), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, tensor.grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_computed_in_float32(name, dtype):
    loss, x, y, _ = CASES[name]
    low = jnp.asarray(x, dtype)
    value = loss(low, jnp.asarray(y))
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(low.astype(jnp.float32), jnp.asarray(y)))


def test_reduce_under_weights_and_masks():
    values = jnp.array([1.0, 2.0, jnp.nan])
    assert float(losses.reduce(values[:2])[0]) == 1.5
    assert float(losses.reduce(values, jnp.array([True, True, False]))[0]) == 1.5
    assert float(losses.reduce(values, jnp.array([3.0, 1.0, 0.0]))[0]) == 1.25
    assert float(losses.reduce(values, jnp.zeros(3))[0]) == 0.0


def test_mask_and_weight_multiply():
    mask, weight = jnp.array([True, True, False]), jnp.array([2.0, 1.0, 5.0])
    np.testing.assert_array_equal(losses.example_weight({"mask": mask, "weight": weight}), [2, 1, 0])
    per_token = jnp.array([[True, False]] * 3)
    both = losses.example_weight({"mask": per_token, "weight": weight})
    np.testing.assert_array_equal(both, [[2, 0], [1, 0], [5, 0]])
    assert losses.example_weight({"x": mask}) is None


def _flag(loss, outputs, target, mask=None):
    def f(v, outputs, target):
        losses.check(v, loss, outputs, target, mask)

    run = jax.jit(lambda *xs: sw.pure(f)(sw.bind({}), *xs)[1].checks)
    return run(outputs, target), lambda: sw.pure(f)(sw.bind({}), outputs, target)


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_label_outside_the_classes_is_flagged_and_named(bad):
    labels = jnp.asarray(LABELS).at[3].set(bad)
    found, eager = _flag(losses.softmax_cross_entropy, jnp.asarray(LOGITS), labels)
    assert {name: bool(ok) for name, ok in found.items()} == {"label outside the 5 classes 0 to 4": False}
    with pytest.raises(CheckError, match="label outside the 5 classes 0 to 4 at entry 3"):
        eager()


def test_a_label_is_checked_through_partial_and_not_where_masked():
    labels = jnp.asarray(LABELS).at[3].set(9)
    loss = partial(losses.softmax_cross_entropy, label_smoothing=0.1)
    found, _ = _flag(loss, jnp.asarray(LOGITS), labels, jnp.arange(6) != 3)
    assert [bool(ok) for ok in found.values()] == [True]
    found, _ = _flag(loss, jnp.asarray(LOGITS), labels)
    assert [bool(ok) for ok in found.values()] == [False]


def test_a_target_that_is_no_probability_is_flagged():
    found, _ = _flag(losses.sigmoid_cross_entropy, jnp.zeros(2), jnp.array([0.0, 2.0]))
    assert [bool(ok) for ok in found.values()] == [False]


def test_what_needs_no_check_adds_none():
    assert _flag(losses.squared_error, jnp.zeros(2), jnp.zeros(2))[0] == {}


@pytest.mark.parametrize(
    ("logits", "target"),
    [((4, 3), np.zeros((4, 1), "int32")), ((4, 3), np.zeros(3, "int32")), ((4, 3), np.zeros(4, "float32"))],
)
def test_a_target_that_does_not_fit_says_what_would(logits, target):
    with pytest.raises(DataError, match=r"logits of shape \(4, 3\) need integer labels of shape \(4,\)"):
        losses.softmax_cross_entropy(jnp.zeros(logits), target)


def test_a_column_against_a_vector_is_an_error_and_no_broadcast():
    with pytest.raises(DataError, match=r"\(4, 1\).*\(4,\)"):
        losses.squared_error(jnp.zeros((4, 1)), jnp.zeros(4))


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigError, match="'softmax_crossentropy'; did you mean 'softmax_cross_entropy'"):
        losses.resolve("softmax_crossentropy")
