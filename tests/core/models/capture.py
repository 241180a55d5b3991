"""Capturing intermediates by path pattern, through a scan as through an unrolled stack."""

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
    scores = jax.nn.softmax(x @ x.T)
    v.sow("attn", scores)
    h = L.Dense(4)(v.up, scores @ x)
    v.sow("hidden", h)
    return x + h


def unrolled(v, x):
    for i in range(DEPTH):
        x = block(v.blocks[i], x)
    return x


def scanned(v, x):
    return L.Scan(block, DEPTH, remat="nothing_saveable")(v.blocks, x)


X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


@functools.cache
def weights():
    return jax.device_get(sw.init(unrolled, 0, X)[0])


def test_the_same_from_both():
    params = weights()
    y, _, one = apply(unrolled, params, {}, X, capture="blocks/*/attn")
    z, _, other = apply(scanned, {"blocks": sw.stack(params["blocks"])}, {}, X, capture="blocks/*/attn")
    assert jax.tree.map(jnp.shape, one) == {"blocks": {str(i): {"attn": (5, 5)} for i in range(DEPTH)}}
    assert jax.tree.map(jnp.shape, other) == {"blocks": {"attn": (DEPTH, 5, 5)}}
    assert np.allclose(sw.stack(jax.device_get(one["blocks"]))["attn"], other["blocks"]["attn"], atol=1e-6)
    assert np.allclose(y, z, atol=1e-5)


def test_all_none_and_one():
    params = weights()
    assert sorted(apply(unrolled, params, {}, X, capture=True)[2]["blocks"]["1"]) == ["attn", "hidden"]
    assert list(apply(unrolled, params, {}, X, capture="blocks/1/hidden")[2]["blocks"]) == ["1"]
    assert len(apply(unrolled, params, {}, X)) == 2
    assert apply(unrolled, params, {}, X, capture="nothing/here")[2] == {}


def test_a_second_value_of_one_name_makes_a_tuple():
    def twice(v, x):
        v.sow("pair", (x, x))
        v.sow("pair", (x + 1, x))
        return x

    captured = apply(twice, {}, {}, 1.0, capture=True)[2]
    assert captured == {"pair": ((1.0, 1.0), (2.0, 1.0))}


def test_sowing_inside_a_bare_scan():
    params = weights()
    bare = lambda v, x: jax.lax.scan(lambda x, _: (block(v.blocks[0], x), None), x, None, DEPTH)[0]  # noqa: E731
    part = {"blocks": {"0": params["blocks"]["0"]}}
    with pytest.raises(sw.EffectError, match=r"blocks/0: sow\('attn'\) cannot work: it belongs to another JAX trace"):
        apply(bare, part, {}, X, capture="**/attn")
    apply(bare, part, {}, X)  # nothing is captured, so nothing is lost


def test_a_name_that_is_a_value_and_a_scope():
    def both(v, x):
        v.sow("attn", x)
        v.attn.sow("weights", x)
        return x

    with pytest.raises(sw.DeclarationError, match="attn is a captured value and a scope that holds attn/weights; give"):
        apply(both, {}, {}, X, capture=True)


if __name__ == "__main__":
    stacked = {"blocks": sw.stack(weights()["blocks"])}
    print(jax.tree.map(jnp.shape, apply(scanned, stacked, {}, X, capture="blocks/*/attn")[2]))
