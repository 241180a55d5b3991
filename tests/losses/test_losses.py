"""Losses against their formulas in NumPy and SciPy, in float64, the gradient by central differences."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import sapwood as sw
from sapwood import CheckError, ConfigError, DataError, losses
from sapwood.core import migration_hints

RNG = np.random.default_rng(1)
LOGITS = RNG.normal(size=(6, 5)).astype("float32") * 3
LABELS = np.array([0, 4, 2, 2, 1, 3], "int32")
SOFT = RNG.dirichlet(np.ones(5), 6).astype("float32")
X, Y = RNG.normal(size=(2, 6, 5)).astype("float32") * 2
BITS = RNG.integers(0, 2, (6, 5)).astype("float32")


HOT = np.eye(5)[LABELS]


def _cross_entropy(targets):
    return lambda x: -np.sum(targets * special.log_softmax(x, axis=-1), axis=-1)


def _sigmoid_cross_entropy(x):
    return -(BITS * special.log_expit(x) + (1 - BITS) * special.log_expit(-x))


def _focal(x, gamma=2.0):
    p = special.expit(x)
    right = p * BITS + (1 - p) * (1 - BITS)
    return _sigmoid_cross_entropy(x) * (1 - right) ** gamma


def _cosine(x):
    return 1 - np.sum(x * Y, -1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(Y, axis=-1))


CASES = {  # name: the loss, outputs, targets, the formula
    "labels": (losses.softmax_cross_entropy, LOGITS, LABELS, _cross_entropy(HOT)),
    "smooth": (
        partial(losses.softmax_cross_entropy, label_smoothing=0.1), LOGITS, LABELS,
        _cross_entropy(0.9 * HOT + 0.1 / 5)),
    "soft": (losses.softmax_cross_entropy, LOGITS, SOFT, _cross_entropy(SOFT)),
    "sigmoid": (losses.sigmoid_cross_entropy, X, BITS, _sigmoid_cross_entropy),
    "focal": (losses.focal, X, BITS, _focal),
    "squared": (losses.squared_error, X, Y, lambda x: (x - Y) ** 2),
    "absolute": (losses.absolute_error, X, Y, lambda x: np.abs(x - Y)),
    "huber": (partial(losses.huber, delta=0.7), X, Y, lambda x: special.huber(0.7, x - Y)),
    "log_cosh": (losses.log_cosh, X, Y, lambda x: np.log(np.cosh(x - Y))),
    "hinge": (losses.hinge, X, 2 * BITS - 1, lambda x: np.maximum(0, 1 - x * (2 * BITS - 1))),
    "kl": (
        losses.kl_divergence, np.log(SOFT[::-1].copy()), SOFT,
        lambda x: special.rel_entr(SOFT, np.exp(x)).sum(-1)),
    "cosine": (losses.cosine_distance, X, Y, _cosine),
}  # fmt: skip


def _differences(f, x, step=1e-6):
    """The gradient of ``f(x).sum()`` by central differences, in float64."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[place] = step
        gradient[place] = (f(x + nudge).sum() - f(x - nudge).sum()) / (2 * step)
    return gradient


def test_every_loss_has_an_oracle():
    tested = {getattr(loss, "func", loss).__name__ for loss, *_ in CASES.values()}
    assert tested == set(losses.LOSSES)


@cache
def measured():
    """Value and gradient of every case, by one program."""

    def both(loss, x, y):
        return loss(x, y), jax.grad(lambda x: loss(x, y).sum())(x)

    given = {name: (x, y) for name, (_, x, y, _) in CASES.items()}
    return jax.device_get(jax.jit(lambda given: {name: both(CASES[name][0], *xs) for name, xs in given.items()})(given))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    _, x, _, formula = CASES[name]
    wide = x.astype(np.float64)
    value, gradient = measured()[name]
    np.testing.assert_allclose(value, formula(wide), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient, _differences(formula, wide), rtol=2e-5, atol=2e-6)


@cache
def measured_low(dtype):
    """Every case from values of few bits, and from the same values in float32."""

    def both(loss, low, y):
        return loss(low, y), loss(low.astype(jnp.float32), y)

    given = {name: (x.astype(jnp.dtype(dtype)), y) for name, (_, x, y, _) in CASES.items()}
    run = jax.jit(
        lambda given: {name: both(CASES[name][0], *xs) for name, xs in given.items()},
        compiler_options={"xla_allow_excess_precision": False},  # what is rounded un-jitted is rounded here
    )
    return jax.device_get(run(given))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_computed_in_float32(name, dtype):
    value, expected = measured_low(dtype)[name]
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected)


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


def _wrong(label):
    """The labels with another one in the place of the fourth."""
    return np.where(np.arange(6) == 3, label, LABELS).astype("int32")


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_label_outside_the_classes_is_flagged_and_named(bad):
    found, eager = _flag(losses.softmax_cross_entropy, LOGITS, _wrong(bad))
    assert {name: bool(ok) for name, ok in found.items()} == {"label outside the 5 classes 0 to 4": False}
    with pytest.raises(CheckError, match="label outside the 5 classes 0 to 4 at entry 3"):
        eager()


def test_a_label_is_checked_through_partial_and_not_where_masked():
    labels = _wrong(9)
    loss = partial(losses.softmax_cross_entropy, label_smoothing=0.1)
    found, _ = _flag(loss, LOGITS, labels, np.arange(6) != 3)
    assert [bool(ok) for ok in found.values()] == [True]
    found, _ = _flag(loss, LOGITS, labels)
    assert [bool(ok) for ok in found.values()] == [False]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_few_bits_mean_the_classes_that_wide_ones_mean(smoothing):
    """A class that uint8 does not hold, 256, must not turn into 0 beside them."""
    loss = partial(losses.softmax_cross_entropy, label_smoothing=smoothing)
    logits, target = np.random.default_rng(0).normal(size=(3, 600)).astype("float32"), np.int32([0, 44, 255])
    wide, narrow = jax.jit(lambda x, *targets: [loss(x, y) for y in targets])(logits, target, target.astype("uint8"))
    np.testing.assert_array_equal(narrow, wide)
    for classes in (256, 600):
        found, _ = _flag(loss, logits[:, :classes], target.astype("uint8"))
        assert [bool(ok) for ok in found.values()] == [True]


def test_a_target_that_is_no_probability_is_flagged():
    found, _ = _flag(losses.sigmoid_cross_entropy, np.zeros(2, "f4"), np.float32([0.0, 2.0]))
    assert [bool(ok) for ok in found.values()] == [False]


@pytest.mark.parametrize(
    ("loss", "outputs", "target", "message"),
    [(losses.hinge, np.zeros(2), [1, 0], r"other than -1 and 1; labels 0 and 1 are written 2 \* target - 1"),
     (losses.softmax_cross_entropy, np.zeros((2, 2)), [[0.5, 0.5], [1.0, 1.0]], "no distribution over the 2 classes"),
     (losses.kl_divergence, np.zeros((2, 2)), [[0.5, 0.5], [1.0, 0.0]], "no log-probabilities; take jax.nn.log_softm")],
)  # fmt: skip
def test_a_target_that_would_be_misread_is_flagged(loss, outputs, target, message):
    target = np.asarray(target, "f4" if np.ndim(target) > 1 else "i4")
    found, eager = _flag(loss, outputs.astype("f4"), target)
    assert [bool(ok) for ok in found.values()].count(False) == 1
    with pytest.raises(CheckError, match=message):
        eager()


def test_targets_that_mean_what_the_loss_means_pass():
    log_p = np.log(SOFT)
    for loss, outputs, target in ((losses.hinge, np.zeros(2, "f4"), np.int32([-1, 1])),
                                  (losses.softmax_cross_entropy, LOGITS, SOFT.astype(jnp.bfloat16)),
                                  (losses.kl_divergence, log_p.astype(jnp.bfloat16), SOFT)):  # fmt: skip
        assert all(bool(ok) for ok in _flag(loss, outputs, target)[0].values())


@pytest.mark.parametrize(
    ("name", "options"),
    [("softmax_cross_entropy", {"label_smoothing": 1.5}), ("softmax_cross_entropy", {"label_smoothing": -0.1}),
     ("huber", {"delta": 0.0}), ("huber", {"delta": float("nan")}), ("focal", {"gamma": -2.0})],
)  # fmt: skip
def test_options_that_would_turn_a_loss_round_are_refused(name, options):
    said = ", ".join(f"{option}={value}" for option, value in options.items())
    with pytest.raises(ConfigError, match=rf"{name}\({said}\): .* is expected"):
        losses.LOSSES[name](jnp.ones((2, 3)), jnp.full((2, 3), 1 / 3), **options)


def test_one_output_is_no_choice_between_classes():
    for target in (np.zeros(4, "int32"), np.ones((4, 1), "f4")):
        with pytest.raises(DataError, match=r"its softmax is always 1.*take sigmoid_cross_entropy"):
            losses.softmax_cross_entropy(np.zeros((4, 1), "f4"), target)


def test_what_needs_no_check_adds_none():
    assert _flag(losses.squared_error, np.zeros(2, "f4"), np.zeros(2, "f4"))[0] == {}


@pytest.mark.parametrize(
    ("logits", "target"),
    [((4, 3), np.zeros((4, 1), "int32")), ((4, 3), np.zeros(3, "int32")), ((4, 3), np.zeros(4, "float32"))],
)
def test_a_target_that_does_not_fit_says_what_would(logits, target):
    with pytest.raises(DataError, match=r"logits of shape \(4, 3\) need integer labels of shape \(4,\)"):
        losses.softmax_cross_entropy(np.zeros(logits, "float32"), target)


def test_a_column_against_a_vector_is_an_error_and_no_broadcast():
    with pytest.raises(DataError, match=r"\(4, 1\).*\(4,\)"):
        losses.squared_error(np.zeros((4, 1), "f4"), np.zeros(4, "f4"))


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigError, match="'softmax_crossentropy'; did you mean 'softmax_cross_entropy'"):
        losses.resolve("softmax_crossentropy")
    assert {code.strip('"') for code, *_ in migration_hints.LOSSES.values()} <= set(losses.LOSSES)
