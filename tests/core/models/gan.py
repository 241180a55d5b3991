"""A GAN whose two players share an encoder: one tree, two functions of it, each trained on its own part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def encode(v, x):
    return jnp.tanh(L.Dense(8)(v.shared, x))


def generate(v, z):
    return L.Dense(2)(v.generator, encode(v, z))


def judge(v, x):
    return L.Dense(1)(v.critic, encode(v, x))[..., 0]


def both(v, z, real):
    """What is needed to declare every variable of the game."""
    return judge(v, generate(v, z)), judge(v, real)


def critic_loss(v, z, real):
    fake, true = both(v, z, real)
    return jax.nn.softplus(fake).mean() + jax.nn.softplus(-true).mean()


def generator_loss(v, z, real):
    fake, _ = both(v, z, real)
    return jax.nn.softplus(-fake).mean()


@functools.partial(jax.jit, static_argnames=("names", "loss"))
def step(params, names, loss, z, real, rate=0.1):
    """A gradient step on the children called ``names``; the others stay."""

    def of_part(part):
        return apply(loss, {**params, **part}, {}, z, real)[0]

    part = {name: params[name] for name in names}
    return {**params, **jax.tree.map(lambda p, g: p - rate * g, part, jax.grad(of_part)(part))}


Z, REAL = (np.random.default_rng(i).normal(i, size=(16, 2)).astype("float32") for i in (0, 2))


@functools.cache
def weights():
    return jax.device_get(sw.init(both, 0, Z, REAL))


def test_each_player_moves_its_own_part():
    params, _ = weights()
    assert sorted(params) == ["critic", "generator", "shared"]
    after = step(params, ("critic", "shared"), critic_loss, Z, REAL)
    assert np.array_equal(after["generator"]["kernel"], params["generator"]["kernel"])
    assert not np.array_equal(after["shared"]["kernel"], params["shared"]["kernel"])
    after = step(params, ("generator",), generator_loss, Z, REAL)
    assert not np.array_equal(after["generator"]["kernel"], params["generator"]["kernel"])
    assert apply(generator_loss, after, {}, Z, REAL)[0] < apply(generator_loss, params, {}, Z, REAL)[0]


def test_the_whole_tree_is_too_much_for_one_player():
    params, _ = weights()
    with pytest.raises(sw.DeclarationError, match="'generate' declares no params critic/bias, params critic/kernel"):
        apply(generate, params, {}, Z)


def test_players_that_disagree_about_the_shared_encoder():
    def wider(v, x):
        return both(v, x, x)[0], L.Dense(16)(v.shared, x)

    with pytest.raises(sw.DeclarationError, match=r"params shared/kernel is declared twice with a different shape"):
        sw.spec(wider, Z)


if __name__ == "__main__":
    params, _ = sw.init(both, 0, Z, REAL)
    for _ in range(100):
        params = step(params, ("critic", "shared"), critic_loss, Z, REAL)
        params = step(params, ("generator",), generator_loss, Z, REAL)
    fake = apply(generate, {k: params[k] for k in ("shared", "generator")}, {}, Z)[0]
    print("mean of the real points", REAL.mean(0), "of the generated ones", fake.mean(0))
