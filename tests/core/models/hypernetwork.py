"""A hypernetwork: a network whose output is another network's parameters (Ha et al. 2016, arXiv:1609.09106)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0)


def target(v, x):
    return L.Dense(1)(v.out, jnp.tanh(L.Dense(4)(v.hidden, x)))


def hyper(v, task, x):
    """Run `target` on ``x`` with parameters made from ``task``."""
    wanted, tree = jax.tree.flatten(sw.spec(target, x).params)
    made = [0.1 * L.Dense(p.size)(v.heads[i], task).reshape(p.shape) for i, p in enumerate(wanted)]
    return target(v.target.replace(params=jax.tree.unflatten(tree, made)), x)


def dense_from(v, task, x):
    """The short form: a raw dict is a layer's variables."""
    return L.Dense(3)({"kernel": L.Dense(6)(v.kernel, task).reshape(2, 3), "bias": jnp.zeros(3)}, x)


TASK, X = np.array([1.0, -1.0, 0.5], "float32"), np.random.default_rng(0).normal(size=(5, 2)).astype("float32")


def test_only_the_hypernetwork_has_parameters():
    params, state = sw.init(hyper, 0, TASK, X)
    assert {name: list(tree) for name, tree in params.items()} == {"heads": ["0", "1", "2", "3"]}
    assert state == {}
    y, _ = apply(hyper, params, {}, TASK, X)
    other, _ = apply(hyper, params, {}, -TASK, X)
    assert y.shape == (5, 1)
    assert not np.allclose(y, other)


def test_gradients_reach_the_hypernetwork():
    params, _ = sw.init(dense_from, 0, TASK, X)
    gradient = jax.jit(jax.grad(lambda p: sw.apply(dense_from, p, {}, TASK, X)[0].sum()))(params)
    expected = np.outer(TASK, (X.T @ np.ones((5, 3))).ravel())
    assert np.allclose(gradient["kernel"]["kernel"], expected, atol=1e-5)


def test_generated_parameters_of_another_shape():
    def wrong(v, task, x):
        return L.Dense(3)({"kernel": L.Dense(8)(v.kernel, task).reshape(2, 4), "bias": jnp.zeros(3)}, x)

    with pytest.raises(sw.DeclarationError, match=r"kernel: the model declares shape \(2, 3\), .* \(2, 4\)") as caught:
        sw.spec(wrong, TASK, X)
    assert caught.value.__notes__[0] == "in (root): Dense(features=3) on float32[5,2]"


def test_a_generated_parameter_is_missing():
    with pytest.raises(sw.DeclarationError, match=r"params has no 'bias' \(shape \(3,\), float32\).*holds kernel"):
        L.Dense(3)({"kernel": np.ones((2, 3), "float32")}, X)


if __name__ == "__main__":
    params, _ = sw.init(hyper, 0, TASK, X)
    print("hypernetwork", jax.tree.map(jnp.shape, params), "->", sw.apply(hyper, params, {}, TASK, X)[0][:2, 0])
