"""One block many times: unrolled, rematerialised, scanned, and scanned with remat are the same network.

Same first parameters, same dropout masks, same batch statistics, same gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

DEPTH = 2

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


@sw.layer
def block(v, x):
    h = L.Dropout(0.5)(v.drop, jnp.tanh(L.BatchNorm()(v.norm, L.Dense(4, bias=False)(v.up, x))))
    v.loss("size", 0.01 * jnp.mean(h**2))
    return x + h


def unrolled(v, x):
    for i in range(DEPTH):
        x = block(v.blocks[i], x)
    return x


def unrolled_remat(v, x):
    for i in range(DEPTH):
        x = L.Remat(block)(v.blocks[i], x)
    return x


def scanned(v, x):
    return L.Scan(block, DEPTH)(v.blocks, x)


def scanned_remat(v, x):
    return L.Scan(block, DEPTH, remat="nothing_saveable")(v.blocks, x)


X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


@functools.cache
def weights(model):
    return jax.device_get(sw.init(model, 0, X))


def objective(model, params, state):
    y, updates = sw.pure(model)(sw.bind(params, state, rng=1, train=True), X)
    return jnp.sum(y**2) + sum(jax.tree.leaves(updates.losses)), (y, updates.state)


@functools.cache
def step(model):
    """Loss, result, state and gradient of a training step, all as an unrolled model names them."""
    params, state = weights(model)
    run = jax.jit(jax.value_and_grad(functools.partial(objective, model), has_aux=True))
    (loss, (y, after)), gradient = jax.device_get(run(params, state))
    trees = params, after, gradient
    if model in (scanned, scanned_remat):
        trees = ({"blocks": sw.unstack(tree["blocks"])} for tree in trees)
    return loss, y, *trees


def equal(a, b, **tolerance):
    same = (lambda a, b: np.allclose(a, b, **tolerance)) if tolerance else np.array_equal
    return jax.tree.all(jax.tree.map(same, a, b))


@pytest.mark.parametrize("other", [unrolled_remat, scanned, scanned_remat])
def test_the_same_network(other):
    loss, y, params, state, gradient = step(unrolled)
    loss2, y2, params2, state2, gradient2 = step(other)
    assert equal(params, params2)
    assert equal(y == X, y2 == X)  # what was dropped in every block
    assert equal((loss, y, state), (loss2, y2, state2), rtol=1e-5, atol=1e-6)
    assert equal(gradient, gradient2, rtol=1e-4, atol=1e-5)


def test_blocks_drop_different_units():
    drops = lambda v, x: L.Scan(L.Dropout(0.5), 2)(v.a, x)  # noqa: E731
    y, _ = apply(drops, {}, {}, np.ones(400, "float32"), rng=0, train=True)
    assert 60 < np.count_nonzero(y) < 140  # a quarter survives two different masks, a half would survive one mask twice


def test_trees_convert():
    params, state = weights(unrolled)
    stacked = [{"blocks": sw.stack(tree["blocks"])} for tree in (params, state)]
    assert equal(apply(scanned, *stacked, X)[0], apply(unrolled, params, state, X)[0], atol=1e-6)


def test_the_other_tree():
    params, state = weights(unrolled)
    stacked = [{"blocks": sw.stack(tree["blocks"])} for tree in (params, state)]
    with pytest.raises(
        sw.DeclarationError, match=r"blocks/0/norm/bias has shape \(4,\); stack\(2\) expects 2 .*sw.stack"
    ):
        apply(scanned, params, state, X)
    with pytest.raises(
        sw.DeclarationError, match=r"no 'blocks/0/up/kernel' .* at 'blocks' it holds norm, up.*sw.unstack"
    ):
        apply(unrolled, *stacked, X)


def test_a_bare_scan_of_blocks():
    params, state = weights(unrolled)
    bare = lambda v, x: jax.lax.scan(lambda x, _: (block(v.blocks[0], x), None), x, None, DEPTH)[0]  # noqa: E731
    part = {"blocks": {"0": params["blocks"]["0"]}}, {"blocks": {"0": state["blocks"]["0"]}}
    with pytest.raises(sw.EffectError, match=r"blocks/0/norm: put\(mean=...\) cannot work: .*lifted L.Scan"):
        apply(bare, *part, X, rng=0, train=True)


if __name__ == "__main__":
    for model in (unrolled, unrolled_remat, scanned, scanned_remat):
        print(f"{model.__name__:15} loss {step(model)[0]:.6f}")
