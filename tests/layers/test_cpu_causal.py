"""Causal attention in blocks against the formula that works out every pair of positions."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapwood import layers as L
from sapwood.layers.attentions.cpu_causal import MOST, causal_attention, pays

module = importlib.import_module("sapwood.layers.attentions.cpu_causal")


def formula(q, k, v, scale=None):
    """softmax(q k^T * scale) v over the keys up to each query, every pair worked out, in NumPy's order of things."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = jnp.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "scale"), [(128, 2, 2, None), (150, 4, 2, None), (110, 3, 1, 0.3), (2, 2, 1, None)]
)
def test_matches_the_formula(length, heads, kv_heads, scale, agree, sample):
    agree(
        lambda q, k, v: causal_attention(q, k, v, scale),
        lambda q, k, v: formula(q, k, v, scale),
        sample(2, length, heads, 8), sample(2, length, kv_heads, 8), sample(2, length, kv_heads, 8),
    )  # fmt: skip


@pytest.mark.parametrize(("length", "most"), [(150, 2), pytest.param(700, MOST, marks=pytest.mark.slow)])
def test_no_more_blocks_than_most(length, most, agree, sample, monkeypatch):
    monkeypatch.setattr(module, "MOST", most)
    xs = [sample(2, length, 1, 8) for _ in range(3)]
    agree(causal_attention, formula, *xs)
    text = str(jax.make_jaxpr(causal_attention)(*xs))
    assert text.count("dot_general") == 2 * most


def test_a_query_sees_no_later_position(sample):
    q, k, v = (sample(1, 130, 2, 4) for _ in range(3))
    slope = jax.jit(jax.grad(lambda k, at: causal_attention(q, k, v)[0, at].sum()))
    for at in (0, 63, 64, 100):
        seen = np.asarray(slope(k, at))
        assert not seen[0, at + 1 :].any()
        assert seen[0, : at + 1].any() or at == 0  # the softmax over one key has no slope


def test_large_scores_stay_finite(sample):
    q, k, v = (100 * sample(1, 128, 1, 4) for _ in range(3))
    total, slope = jax.device_get(jax.jit(jax.value_and_grad(lambda q: causal_attention(q, k, v).sum()))(q))
    assert np.isfinite(total)
    assert np.isfinite(slope).all()


def test_second_derivatives(sample):
    q, k, v = (sample(1, 128, 1, 4) for _ in range(3))

    def product(f, q):  # a Hessian times a vector, forward over reverse
        return jax.jvp(jax.grad(lambda q: (f(q, k, v) ** 2).sum()), (q,), (jnp.ones_like(q),))[1]

    ours, theirs = jax.jit(lambda q: [product(f, q) for f in (causal_attention, formula)])(q)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(sample):
    xs = [sample(1, 130, 2, 8) for _ in range(3)]
    narrow = [x.astype(jnp.bfloat16) for x in xs]
    narrow, wide = jax.device_get(jax.jit(lambda narrow, xs: (causal_attention(*narrow), formula(*xs)))(narrow, xs))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype("float32"), wide, atol=0.05)


def test_attention_takes_it_on_a_cpu_alone_where_it_pays(sample, monkeypatch):
    q = sample(1, 128, 2, 8)
    attention = lambda q: L.attention(q, q, q, causal=True)  # noqa: E731
    assert pays(q)
    assert not pays(q[:, :100])
    layer = jax.jit(attention)(q)
    np.testing.assert_array_equal(layer, jax.jit(lambda q: causal_attention(q, q, q))(q))
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    assert not pays(q)
    np.testing.assert_allclose(jax.jit(lambda q: attention(q))(q), layer, rtol=1e-4, atol=1e-5)


def test_float64_stays_float64(sample):
    xs = [sample(1, 128, n, 4, dtype="float64") / 3 for n in (4, 2, 2)]

    @jax.jit
    def run(*xs):
        return [
            jax.value_and_grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2))(*xs)
            for f in (functools.partial(L.attention, causal=True), formula)
        ]

    with jax.enable_x64():
        ours, theirs = run(*xs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == "float64"
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_a_batch_of_nothing_gives_nothing():
    q, k = np.zeros((0, 128, 4, 8), "float32"), np.zeros((0, 128, 2, 8), "float32")

    @jax.jit
    def run(q, k):
        y, pull = jax.vjp(lambda q, k: causal_attention(q, k, k, segments=np.zeros((0, 128), int)), q, k)
        return y, *pull(y), L.attention(q, k, k, causal=True)

    assert [x.shape for x in run(q, k)] == [q.shape, q.shape, k.shape, q.shape]
