"""An ensemble with batch norm: vmapped inside the model, and outside around the whole of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

MEMBERS = 3

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


@sw.layer
def net(v, x):
    x = jax.nn.relu(L.BatchNorm()(v.norm, L.Dense(8)(v.hidden, x)))
    return L.Dense(2)(v.out, L.Dropout(0.5)(v.drop, x))


def inside(v, x):
    return L.Vmap(net, MEMBERS, in_axes=None)(v.members, x).mean(0)


def outside(params, state, x, key):
    """Every member a whole run of its own."""
    run = lambda p, s, k: sw.apply(net, p, s, x, rng=k, train=True)  # noqa: E731
    return jax.vmap(run)(params, state, jax.random.split(key, MEMBERS))


def shared_statistics(v, x):
    """Wrong: all members would write one state."""
    y, updates = jax.vmap(sw.pure(net), in_axes=(None, 0))(v.fork(), jnp.stack([x] * MEMBERS))
    v.merge(updates)
    return y


X = np.random.default_rng(7).normal(size=(16, 4)).astype("float32")


@functools.cache
def inside_weights():
    return jax.device_get(sw.init(inside, 0, X))


@functools.cache
def net_weights():
    return jax.device_get(sw.init(net, 0, X))


def test_members_are_independent():
    params, state = inside_weights()
    assert params["members"]["hidden"]["kernel"].shape == (MEMBERS, 4, 8)
    y, after = apply(inside, params, state, X, rng=1, train=True)
    assert y.shape == (16, 2)
    mean = np.asarray(after["members"]["norm"]["mean"])
    assert mean.shape == (MEMBERS, 8)
    assert not np.allclose(mean[0], mean[1])


def test_inside_equals_a_loop_over_members():
    params, state = inside_weights()
    members = sw.unstack(params["members"]), sw.unstack(state["members"])
    alone = [apply(net, members[0][i], members[1][i], X)[0] for i in members[0]]
    y, _ = apply(inside, params, state, X)
    assert np.allclose(y, np.mean(alone, 0), atol=1e-6)


def test_members_inside_drop_different_units():
    drops = lambda v, x: L.Vmap(L.Dropout(0.5), MEMBERS, in_axes=None)(v.drop, x)  # noqa: E731
    y = np.asarray(apply(drops, {}, {}, np.ones(64, "float32"), rng=0, train=True)[0])
    assert not np.array_equal(y[0], y[1])
    assert not np.array_equal(y[1], y[2])


def test_outside_each_member_is_a_run():
    @jax.jit
    def run():
        init = jax.vmap(lambda key: sw.init(net, key, X))
        params, state = init(jax.random.split(jax.random.key(0), MEMBERS))
        member = jax.tree.map(lambda leaf: leaf[1], (params, state))
        alone = sw.apply(net, *member, X, rng=jax.random.split(jax.random.key(1), MEMBERS)[1], train=True)
        return outside(params, state, X, jax.random.key(1)), alone

    (y, after), (y1, after1) = jax.device_get(run())
    assert y.shape == (MEMBERS, 16, 2)
    assert np.allclose(y[1], y1, atol=1e-5)
    assert np.allclose(after["norm"]["mean"][1], after1["norm"]["mean"], atol=1e-6)


def test_one_key_for_all_rows_is_refused():
    params, state = net_weights()
    with pytest.raises(
        sw.EffectError, match=r"drop: rng\('mask'\) cannot draw: its key belongs to another JAX trace, and every row"
    ):
        apply(shared_statistics, params, state, X, rng=0, train=True)


def test_one_state_for_all_members_is_refused():
    params, state = net_weights()
    v = sw.bind(params, state, train=True)
    quiet = lambda v, x: L.BatchNorm()(v.norm, L.Dense(8)(v.hidden, x))  # noqa: E731
    _, updates = jax.jit(jax.vmap(sw.pure(quiet), in_axes=(None, 0)))(v, np.stack([X] * MEMBERS))
    with pytest.raises(sw.DeclarationError, match=r"merge\(updates\): state norm/mean is float32\[8\], the update"):
        sw.pure(lambda v: v.merge(updates))(v)


if __name__ == "__main__":
    params, state = sw.init(inside, 0, X)
    y, state = apply(inside, params, state, X, rng=1, train=True)
    print("mean over", MEMBERS, "members:", y[0], "their batch means:", state["members"]["norm"]["mean"][:, 0])
