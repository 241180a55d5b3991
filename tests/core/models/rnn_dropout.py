"""A recurrent network that drops other units at every step: weights shared by all steps, keys not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def cell(v, h, x):
    h = jnp.tanh(L.Dense(8)(v.inp, x) + L.Dense(8, bias=False)(v.rec, h))
    return L.Dropout(0.5)(v.drop, h)


def rnn(v, xs):
    """``xs`` (length, features): the states of every step, (length, 8)."""

    def step(h, inputs):
        x, key = inputs
        h, _ = sw.pure(cell)(v.replace(rng=key), h, x)
        return h, h

    keys = jax.random.split(v.rng("steps"), len(xs)) if v.train else None
    return jax.lax.scan(step, jnp.zeros(8), (xs, keys))[1]


def unrolled(v, xs):
    h, hs = jnp.zeros(8), []
    for x, key in zip(xs, jax.random.split(v.rng("steps"), len(xs)), strict=True):
        h = cell(v.replace(rng=key), h, x)
        hs.append(h)
    return jnp.stack(hs)


def carried(v, xs):
    """The cursor in the carry: other masks again, one for each step."""

    def step(carry, x):
        v, h = carry
        h, _ = sw.pure(cell)(v, h, x)
        return (v, h), h

    return jax.lax.scan(step, (v.fork(), jnp.zeros(8)), xs)[1]


def one_key(v, xs):
    """Wrong: the key would be the same at every step."""
    return jax.lax.scan(lambda h, x: (cell(v, h, x),) * 2, jnp.zeros(8), xs)[1]


XS = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


@functools.cache
def weights():
    return sw.init(rnn, 0, XS)


def test_every_step_has_its_own_mask_the_same_ones_as_unrolled():
    params, _ = weights()
    hs = np.asarray(apply(rnn, params, {}, XS, rng=1, train=True)[0])
    masks = {tuple(row) for row in (hs == 0).tolist()}
    assert len(masks) == len(XS)
    loop = np.asarray(apply(unrolled, params, {}, XS, rng=1, train=True)[0])
    assert ((loop == 0) == (hs == 0)).all()
    assert np.allclose(loop, hs, atol=1e-6)


def test_a_cursor_in_the_carry():
    params, _ = weights()
    hs = np.asarray(apply(carried, params, {}, XS, rng=1, train=True)[0])
    assert len({tuple(row) for row in (hs == 0).tolist()}) == len(XS)
    assert np.allclose(apply(carried, params, {}, XS)[0], apply(rnn, params, {}, XS)[0], atol=1e-6)


def test_the_gradient_through_the_scan():
    params, _ = weights()
    scan, loop = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(apply(f, p, {}, XS, rng=1, train=True)[0] ** 2)))(params)
        for f in (rnn, unrolled)
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), scan, loop))


def test_running_it_twice_draws_anew():
    params, _ = weights()
    both = apply(lambda v, x: (rnn(v, x), rnn(v, x)), params, {}, XS, rng=1, train=True)[0]
    first, second = jax.device_get(both)
    assert not ((first == 0) == (second == 0)).all()


def test_a_closed_over_key_is_refused():
    params, _ = weights()
    with pytest.raises(
        sw.EffectError, match=r"drop: rng\('mask'\) cannot draw: its key belongs to another JAX trace.*v.fork\(\), xs\)"
    ):
        apply(one_key, params, {}, XS, rng=1, train=True)


def test_a_fold_of_a_closed_over_cursor_is_refused():
    def closed(v, xs):
        return jax.lax.scan(lambda h, i: (cell(v.fold(i), h, xs[i]),) * 2, jnp.zeros(8), jnp.arange(3))[1]

    params, _ = weights()
    with pytest.raises(
        sw.EffectError, match=r"drop: .*every step would get the same numbers. Carry it through the loop"
    ):
        apply(closed, params, {}, jnp.asarray(XS), rng=1, train=True)


if __name__ == "__main__":
    params, _ = sw.init(rnn, 0, XS)
    hs, _ = apply(rnn, params, {}, XS, rng=1, train=True)
    print("dropped units, one row a step:\n", (hs == 0).astype(int))
