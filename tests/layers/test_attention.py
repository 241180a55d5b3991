"""Attention against the paper's formula, Keras, and itself with heads repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


def formula(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q k^T / sqrt(d)) v, with each key head repeated for its group of query heads."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    if causal:
        scores = jnp.where(np.tri(*scores.shape[2:], dtype=bool), scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def some_mask(*shape):
    mask = np.random.default_rng(0).random(shape) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "options"),
    [
        (2, 2, 5, 5, {}),
        (4, 2, 5, 7, {"mask": some_mask(2, 1, 5, 7)}),
        (4, 1, 5, 5, {"causal": True, "scale": 0.3}),
        (6, 3, 4, 4, {"causal": True, "mask": some_mask(2, 6, 1, 4)}),
        (3, 3, 1, 9, {"mask": some_mask(1, 1, 1, 9)}),
    ],
)
def test_matches_the_formula(heads, kv_heads, queries, keys, options, agree, sample):
    agree(
        lambda q, k, v: L.attention(q, k, v, **options),
        lambda q, k, v: formula(q, k, v, **options),
        sample(2, queries, heads, 4), sample(2, keys, kv_heads, 4), sample(2, keys, kv_heads, 4),
    )  # fmt: skip


def test_layer_matches_keras(keras, agree, sample):
    mask = some_mask(2, 5, 6)
    oracle = keras.layers.GroupQueryAttention(3, 4, 2)
    oracle.build((2, 5, 8), (2, 6, 8))
    ours = L.MultiHeadAttention(4, head_dim=3, kv_heads=2, bias=True)

    def run(x, context, *weights):
        places = [(a, b) for a in ("query", "key", "value", "out") for b in ("kernel", "bias")]
        params = {}
        for (a, b), w in zip(places, weights, strict=True):
            params.setdefault(a, {})[b] = w
        return ours(params, x, context, mask=mask[:, None])

    shapes = {w.path.split("/")[-2] + "/" + w.name: w.shape for w in oracle.weights}
    order = [f"{a}/{b}" for a in ("query", "key", "value", "attention_output") for b in ("kernel", "bias")]
    assert [w.path.split("/")[-2] + "/" + w.name for w in oracle.weights] == order

    def theirs(x, context, *weights):
        return oracle.stateless_call(list(weights), oracle.non_trainable_variables, x, context, attention_mask=mask)[0]

    xs = [sample(2, 5, 8), sample(2, 6, 8), *(sample(*shapes[name]) for name in order)]
    agree(run, theirs, *xs, rtol=1e-3, atol=1e-4)


def test_causal_sees_nothing_later(sample, weights):
    layer, x = L.MultiHeadAttention(2, causal=True, rotary=L.Rotary()), sample(1, 6, 8)
    params = weights(layer, x)
    run = jax.jit(layer)
    before = np.asarray(run(params, x))
    x[:, 3] += 1
    after = np.asarray(run(params, x))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


def test_padding_does_not_reach_the_rest(sample, weights):
    layer, x = L.MultiHeadAttention(2), sample(2, 6, 8)
    valid = (np.arange(6) < 4)[None, None, None, :]
    run = jax.jit(lambda p, x: (layer(p, x, mask=valid)[:, :4], layer(p, x[:, :4])))
    padded, short = run(weights(layer, x), x)
    np.testing.assert_allclose(padded, short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_softmax_is_float32(dtype, sample):
    q, k, v = (sample(1, 16, 2, 8, dtype=dtype) for _ in range(3))

    @jax.jit
    def run(*low):
        high = [x.astype("float32") for x in low]
        return L.attention(*low, causal=True), formula(*high, causal=True)

    low, high = run((8 * q).astype(q.dtype), k, v)
    assert low.dtype == dtype
    np.testing.assert_allclose(np.asarray(low, "f4"), high, atol=4 * float(jnp.finfo(dtype).eps) * 3)


def test_declares_its_parameters():
    layer, x = L.MultiHeadAttention(4, kv_heads=2, bias=True), np.ones((1, 3, 8), "float32")
    params = sw.spec(layer, x).params
    found = {f"{a}/{b}": (p.shape, p.axes) for a, ps in params.items() for b, p in ps.items()}
    assert found == {
        "query/kernel": ((8, 4, 2), ("embed", "heads", "kv")),
        "query/bias": ((4, 2), ("heads", "kv")),
        "key/kernel": ((8, 2, 2), ("embed", "heads", "kv")),
        "key/bias": ((2, 2), ("heads", "kv")),
        "value/kernel": ((8, 2, 2), ("embed", "heads", "kv")),
        "value/bias": ((2, 2), ("heads", "kv")),
        "out/kernel": ((4, 2, 8), ("heads", "kv", "embed")),
        "out/bias": ((8,), ("embed",)),
    }
    assert sw.spec(L.MultiHeadAttention(2), x, np.ones((1, 5, 12), "float32")).params["key"]["kernel"].shape == (
        12,
        2,
        4,
    )


def test_projections_start_with_unit_variance():
    x = np.random.default_rng(1).normal(size=(4, 9, 256)).astype("float32")
    params = jax.device_get(sw.init(L.MultiHeadAttention(8), 0, x)[0])
    assert abs(np.einsum("ble,ehd->blhd", x, params["query"]["kernel"]).std() - 1) < 0.05
    assert abs(params["out"]["kernel"].std() * 16 - 1) < 0.05


def test_same_numbers_with_heads_on_a_mesh(sample, weights):
    layer, x = L.MultiHeadAttention(4, kv_heads=2, causal=True), sample(4, 6, 8)
    params = weights(layer, x)
    place = sw.parallel.placement(sw.parallel.mesh("data=4,tensor=2"))
    placed = jax.jit(lambda p, x: sw.apply(layer, p, {}, x, place=place)[0])(params, x)
    np.testing.assert_allclose(placed, jax.jit(layer)(params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, r"heads must be an integer above 0"),
        ({"head_dim": -1}, r"head_dim must be"),
        ({"kv_heads": 3}, r"heads must be a multiple of kv_heads, got 4 and 3"),
        ({"kv_heads": 0}, r"kv_heads must be"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(sw.ConfigError, match=message):
        L.MultiHeadAttention(**{"heads": 4, **options})


@pytest.mark.parametrize(
    ("layer", "xs", "options", "message"),
    [
        (L.MultiHeadAttention(3), ((1, 4, 8),), {}, r"8 features do not divide into heads=3"),
        (L.MultiHeadAttention(2), ((4, 8),), {}, r"\(batch, length, features\), got float32\[4,8\]"),
        (L.MultiHeadAttention(2), ((1, 4, 8), (4, 8)), {}, r"\(batch, keys, features\)"),
        (L.MultiHeadAttention(2), ((1, 4, 8), (2, 4, 8)), {}, r"attention expects q .* got q float32\[1,4,2,4\]"),
        (L.MultiHeadAttention(2, causal=True), ((1, 4, 8), (1, 5, 8)), {}, r"as many queries as keys, got 4 and 5"),
        (L.MultiHeadAttention(2), ((1, 4, 8),), {"mask": np.ones((1, 4), bool)}, r"mask\[:, None, None, :\]"),
        (
            L.MultiHeadAttention(2),
            ((1, 4, 8),),
            {"mask": np.ones((1, 1, 4, 4), "float32")},
            r"boolean mask .* got float32",
        ),
        (L.MultiHeadAttention(2), ((1, 4, 8),), {"mask": np.ones((1, 1, 4, 3), bool)}, r"= \(1, 2, 4, 4\)"),
        (L.MultiHeadAttention(2), ((1, 4, 8),), {"positions": np.arange(4)}, r"positions are used by rotary="),
        (L.MultiHeadAttention(2, rotary=L.Rotary()), ((1, 4, 8), (1, 4, 8)), {}, r"cannot be used with a context"),
    ],
)
def test_explains_an_input_that_does_not_fit(layer, xs, options, message):
    with pytest.raises(ValueError, match=message):
        sw.spec(lambda v, *xs: layer(v, *xs, **options), *(jax.ShapeDtypeStruct(x, "float32") for x in xs))


def test_float64_with_a_mask_promotes_no_rank():
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        x, mask = np.ones((2, 3, 1, 4)), np.ones((2, 1, 3, 3), bool)
        y = L.attention(x, x, x, mask, causal=True)
    np.testing.assert_allclose(y, x)
