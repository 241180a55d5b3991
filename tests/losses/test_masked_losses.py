"""Examples of weight 0 may hold anything: every loss and its gradient are those of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import losses
from sapwood.losses.linear_head import linear_cross_entropy

RNG = np.random.default_rng(0)
X, KERNEL = RNG.normal(size=(4, 3)).astype("float32"), RNG.normal(size=(3, 5)).astype("float32")
SOFT = RNG.dirichlet(np.ones(5), 4).astype("float32")


def model(v, x, add):
    return x @ v.param("kernel", (3, 5), None) + add


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_targets_and_outputs_that_do_not_count(loss):
    """Missing targets are NaN in practice, and outputs may be anything for an example that is not there."""
    objective = sw.supervised(model, loss, metrics=(), inputs=("x", "add"), target="y")
    whole = {"x": X, "add": np.zeros((4, 5), "float32"), "y": SOFT, "mask": np.arange(4) < 2}
    targets = SOFT.copy()
    targets[2:] = [[np.nan], [np.inf]]
    outputs = np.float32([[0], [0], [np.nan], [-np.inf]]) * np.ones(5, "float32")
    variants = [whole | {"y": targets, "add": outputs}, whole | {"y": targets, "weight": np.float32([1, 1, 0.5, 3])}]

    @jax.jit
    def run(batches):
        of = lambda batch: jax.value_and_grad(lambda k: objective(sw.bind({"kernel": k}), batch)[0])(KERNEL)  # noqa: E731
        return [of(batch) for batch in batches]

    expected, *found = run([{"x": X[:2], "add": np.zeros((2, 5), "float32"), "y": SOFT[:2]}, *variants])
    for one in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, expected)


def test_features_that_do_not_count_under_a_linear_head():
    x, labels, weight = RNG.normal(size=(2, 3, 3)).astype("float32"), np.ones((2, 3), int), np.float32([[1, 0, 2]] * 2)
    run = jax.jit(jax.grad(lambda x, k: linear_cross_entropy(x, k, labels, weight=weight).total, (0, 1)))
    expected = run(x, KERNEL)
    x[:, 1] = np.nan
    jax.tree.map(np.testing.assert_array_equal, run(x, KERNEL), expected)
    assert all(jnp.any(leaf != 0) for leaf in expected)
