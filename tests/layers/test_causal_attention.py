"""Causal attention in blocks against the formula that works out every pair of positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapwood import layers as L
from sapwood.layers.causal_attention import causal_attention, pays


def formula(q, k, v, scale=None):
    """softmax(q k^T * scale) v over the keys up to each query, every pair worked out, in NumPy's order of things."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = jnp.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "scale"),
    [(128, 2, 2, None), (150, 4, 2, None), (200, 3, 1, 0.3), (2, 2, 1, None), (700, 1, 1, None)],
)
def test_matches_the_formula(length, heads, kv_heads, scale, agree, draw):
    agree(
        lambda q, k, v: causal_attention(q, k, v, scale),
        lambda q, k, v: formula(q, k, v, scale),
        draw(2, length, heads, 8), draw(2, length, kv_heads, 8), draw(2, length, kv_heads, 8),
    )  # fmt: skip


def test_a_query_sees_no_later_position(draw):
    q, k, v = (draw(1, 130, 2, 4) for _ in range(3))
    slope = jax.jit(jax.grad(lambda k, at: causal_attention(q, k, v)[0, at].sum()))
    for at in (0, 63, 64, 100):
        seen = slope(k, at)
        assert not seen[0, at + 1 :].any()
        assert seen[0, : at + 1].any() or at == 0  # the softmax over one key has no slope


def test_large_scores_stay_finite(draw):
    q, k, v = (100 * draw(1, 128, 1, 4) for _ in range(3))
    total, slope = jax.jit(jax.value_and_grad(lambda q: causal_attention(q, k, v).sum()))(q)
    assert bool(jnp.isfinite(total))
    assert bool(jnp.isfinite(slope).all())


def test_second_derivatives(draw):
    q, k, v = (draw(1, 128, 1, 4) for _ in range(3))

    def product(f):  # a Hessian times a vector, forward over reverse
        return jax.jvp(jax.grad(lambda q: (f(q, k, v) ** 2).sum()), (q,), (jnp.ones_like(q),))[1]

    ours, theirs = (jax.jit(functools.partial(product, f))() for f in (causal_attention, formula))
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(draw):
    q, k, v = (draw(1, 256, 2, 8) for _ in range(3))
    narrow = jax.jit(causal_attention)(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), formula(q, k, v), atol=0.05)


def test_attention_takes_it_on_a_cpu_alone_where_it_pays(draw, monkeypatch):
    q = draw(1, 256, 2, 8)
    assert pays(q)
    assert not pays(q[:, :100])
    layer = L.attention(q, q, q, causal=True)
    np.testing.assert_array_equal(layer, causal_attention(q, q, q))
    monkeypatch.setattr("sapwood.layers.causal_attention.platform", lambda: "gpu")
    assert not pays(q)
    np.testing.assert_allclose(L.attention(q, q, q, causal=True), layer, rtol=1e-4, atol=1e-5)


def test_float64_stays_float64(draw):
    with jax.enable_x64():
        q, k, v = (jnp.asarray(draw(1, 130, n, 4), "float64") / 3 for n in (4, 2, 2))
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2)))(q, k, v)
            for f in (functools.partial(L.attention, causal=True), formula)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == "float64"
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_a_batch_of_nothing_gives_nothing():
    q, k = jnp.zeros((0, 128, 4, 8)), jnp.zeros((0, 128, 2, 8))
    y, pull = jax.vjp(lambda q, k: causal_attention(q, k, k, segments=jnp.zeros((0, 128), int)), q, k)
    assert [x.shape for x in (y, *pull(y))] == [q.shape, q.shape, k.shape]
    assert L.attention(q, k, k, causal=True).shape == q.shape
