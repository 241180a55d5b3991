"""MAML: the gradient of a loss after a gradient step (Finn et al. 2017, arXiv:1703.03400)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

RATE = 0.1


def net(v, x):
    return L.Dense(1)(v.out, jnp.tanh(L.Dense(8)(v.hidden, x)))


def loss(v, x, y):
    return jnp.mean((net(v, x) - y) ** 2)


def adapted_loss(v, support, query):
    """The loss on ``query`` of the parameters after one step on ``support``."""
    params = sw.params(v)
    gradient = jax.grad(lambda p: loss(v.replace(params=p), *support))(params)
    return loss(v.replace(params=jax.tree.map(lambda p, g: p - RATE * g, params, gradient)), *query)


def tasks(key, n=4):
    """Sine waves of different phases: support and query points."""
    phases, x = jax.random.uniform(key, (n, 1, 1)), jnp.linspace(-1, 1, 10).reshape(1, 10, 1) + jnp.zeros((n, 1, 1))
    y = jnp.sin(3 * (x + phases))
    return (x[:, ::2], y[:, ::2]), (x[:, 1::2], y[:, 1::2])


def meta_loss(params, support, query):
    return jax.vmap(lambda s, q: sw.apply(adapted_loss, params, {}, s, q)[0])(support, query).mean()


SUPPORT, QUERY = jax.device_get(jax.jit(tasks)(jax.random.key(0)))
ONE = jax.tree.map(lambda a: a[0], (SUPPORT, QUERY))


def test_the_meta_gradient_is_that_of_the_formula():
    params, _ = jax.device_get(sw.init(adapted_loss, 0, *ONE))

    def by_hand(p):
        def run(p, x, y):
            h = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
            return jnp.mean((h @ p["out"]["kernel"] + p["out"]["bias"] - y) ** 2)

        def one(s, q):
            return run(jax.tree.map(lambda a, g: a - RATE * g, p, jax.grad(run)(p, *s)), *q)

        return jax.vmap(one)(SUPPORT, QUERY).mean()

    ours, theirs = jax.jit(lambda p: (jax.grad(meta_loss)(p, SUPPORT, QUERY), jax.grad(by_hand)(p)))(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), ours, theirs))


def test_parameters_of_another_shape_are_refused():
    params, _ = jax.device_get(sw.init(net, 0, ONE[0][0]))
    halved = {**params, "out": jax.tree.map(lambda p: p[:1], params["out"])}
    with pytest.raises(sw.DeclarationError, match=r"params out/kernel: the model declares shape \(8, 1\), the bound"):
        sw.apply(lambda v, x: net(v.replace(params=halved), x), params, {}, ONE[0][0])


def test_a_cursor_is_no_tree_of_parameters():
    with pytest.raises(TypeError, match=r"params must be a nested dict of arrays, got a cursor; use sw.params\(v\)"):
        sw.apply(lambda v: net(v.replace(params=v.inner), ONE[0][0]), {}, {})


if __name__ == "__main__":
    params, _ = sw.init(adapted_loss, 0, *ONE)
    step = jax.jit(jax.value_and_grad(meta_loss))
    for i in range(200):
        value, gradient = step(params, SUPPORT, QUERY)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        if i % 50 == 0:
            print(f"step {i:3d}: loss after one step of adaptation {value:.4f}")
