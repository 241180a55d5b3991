"""All-to-all attention on eight simulated devices against plain attention on one."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.layers import ring, ulysses
from sapwood.layers.ulysses import ulysses_attention

MESHES = {
    "sequence=8": PartitionSpec(None, "sequence", None, None),
    "data=2,sequence=2,tensor=2": PartitionSpec("data", "sequence", "tensor", None),
    "fsdp=2,sequence=4": PartitionSpec("fsdp", "sequence", None, None),
}


def on(mesh):
    return NamedSharding(sw.mesh(mesh), MESHES[mesh])


def packed(batch, length):
    return jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 5, (batch, length)), 1), "int32")


@pytest.mark.parametrize(
    ("mesh", "causal", "packs", "kv_heads", "length"),
    [
        ("sequence=8", True, True, 2, 40),  # fewer heads of keys than shards
        ("sequence=8", True, False, 8, 136),  # long enough for causal attention in blocks
        ("data=2,sequence=2,tensor=2", True, True, 4, 36),
        ("data=2,sequence=2,tensor=2", False, False, 2, 36),
        ("fsdp=2,sequence=4", False, True, 1, 52),
        ("fsdp=2,sequence=4", True, False, 4, 52),
    ],
)
def test_it_is_attention(mesh, causal, packs, kv_heads, length, agree, draw):
    sharding, segments = on(mesh), packed(2, length) if packs else None
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    agree(
        lambda q, k, v: ulysses_attention(q, k, v, causal, None, sharding, segments),
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal),
        draw(2, length, 8, 4), draw(2, length, kv_heads, 4), draw(2, length, kv_heads, 4),
        rtol=2e-5, atol=5e-6, apart=True,
    )  # fmt: skip


def test_keys_of_another_length(agree, draw):
    sharding = on("fsdp=2,sequence=4")
    agree(
        lambda q, k, v: ulysses_attention(q, k, v, sharding=sharding), L.attention,
        draw(2, 12, 4, 4), draw(2, 28, 4, 4), draw(2, 28, 4, 4), apart=True,
    )  # fmt: skip


def test_bfloat16_keeps_its_dtype(draw):
    q, k, v = (draw(1, 64, 8, 8) for _ in range(3))
    narrow = jax.jit(lambda *x: ulysses_attention(*x, True, None, on("sequence=8")))(
        *(x.astype("bfloat16") for x in (q, k, v))
    )
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype("float32"), L.attention(q, k, v, causal=True), atol=0.05)


WAYS = {
    "attention": L.attention,
    "causal": lambda *x: L.attention(*x, causal=True),
    "ring": lambda *x: ring.ring_attention(*x, sharding=on("sequence=8")),
    "ulysses": lambda *x: ulysses_attention(*x, sharding=on("sequence=8")),
}


@pytest.mark.parametrize("way", WAYS)
def test_arrays_of_several_dtypes_are_promoted(way, draw):
    q, k, v = (jnp.asarray(draw(1, 128, 8, 4), dtype) for dtype in ("bfloat16", "float32", "float16"))
    y, pull = jax.vjp(WAYS[way], q, k, v)
    assert y.dtype == jnp.float32
    assert [g.dtype for g in pull(y)] == ["bfloat16", "float32", "float16"]
    np.testing.assert_allclose(y, WAYS[way](*(x.astype("float32") for x in (q, k, v))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", [ring.ring_attention, ulysses_attention])
@pytest.mark.parametrize("sharding", [PartitionSpec(None, "sequence"), "sequence"])
def test_what_is_no_sharding(way, sharding, draw):
    x = draw(1, 16, 8, 4)
    with pytest.raises(sw.InputError, match=r"_attention: sharding is that of q, a jax.sharding.NamedSharding\(mesh"):
        way(x, x, x, sharding=sharding)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, "segments", "padding"])
def test_float64_stays_float64_at_any_length(causal, mask, draw):
    with jax.enable_x64():
        q, k, v = (jnp.asarray(draw(2, 16, n, 4), "float64") / 3 for n in (8, 4, 4))
        segments = packed(2, 16) if mask == "segments" else None
        sees = jnp.asarray([[True] * 16, [False] * 16])[:, None, None]  # the second sequence nothing
        valid = sees if mask == "padding" else None

        def formula(q, k, v):
            k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
            seen = jnp.tril(jnp.ones((16, 16), bool)) if causal else jnp.ones((16, 16), bool)
            seen = seen & (segments[:, :, None] == segments[:, None])[:, None] if mask == "segments" else seen
            seen = seen & valid if mask == "padding" else seen
            scores = jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2, -1e30)
            return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

        def found(f):
            return jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)))(q, k, v))

        expected = found(formula)
        ways = [lambda *x: L.attention(*x, valid, causal, segments=segments)]
        if valid is None:
            ways.append(lambda *x: ulysses_attention(*x, causal, None, on("sequence=8"), segments))
        for way in ways:
            for a, b in zip(found(way), expected, strict=True):
                assert a.dtype == "float64"
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_collectives_are_four_all_to_alls_each_way(draw):
    sharding = on("fsdp=2,sequence=4")
    q, k, v = (jax.device_put(draw(2, 32, 4, 4), sharding) for _ in range(3))

    def count(f, *args):
        text = jax.jit(f).lower(*args).compile().as_text()
        assert not re.search(r" (all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\(", text)
        return len(re.findall(r" all-to-all(?:-start)?\(", text))

    def run(q, k, v):
        return ulysses_attention(q, k, v, True, None, sharding)

    assert count(run, q, k, v) == 4
    assert count(lambda q, k, v, dy: jax.vjp(run, q, k, v)[1](dy), q, k, v, q) in (7, 8)  # y itself is not needed


@pytest.mark.parametrize(
    ("heads", "mesh", "message"),
    [
        (
            6,
            "fsdp=2,sequence=4",
            r"splits 6 heads over sequence=4 of mesh .*over 1 or 2 or 3 or 6 instead of 4, take 4",
        ),
        (2, "data=2,sequence=2,tensor=2", r"2 heads over tensor=2,sequence=2 .* which 4 does not divide"),
    ],
)
def test_explains_heads_that_do_not_divide(heads, mesh, message):
    q = jnp.ones((2, 16, heads, 4))
    with pytest.raises(ValueError, match=message):
        ulysses_attention(q, q, q, sharding=on(mesh))


@pytest.fixture
def ways(monkeypatch):
    """Which way attention went."""
    seen = []
    for module, name in ((ring, "ring_attention"), (ulysses, "ulysses_attention")):
        monkeypatch.setattr(module, name, lambda q, *_, name=name, **__: seen.append(name) or q)
    return seen


@pytest.mark.parametrize(
    ("rules", "mesh", "heads", "way"),
    [
        (None, "data=2,sequence=4", 4, ["ring_attention"]),
        ("ulysses", "data=2,sequence=4", 4, ["ulysses_attention"]),
        ("ulysses+tensor", "data=2,sequence=2,tensor=2", 4, ["ulysses_attention"]),
        ("ulysses+tensor", "data=4,sequence=1,tensor=2", 4, []),
        ("data+sequence", "data=2,sequence=4", 4, ["ring_attention"]),
    ],
)
def test_the_rules_choose_the_way(rules, mesh, heads, way, ways, weights):
    layer, x = L.MultiHeadAttention(heads), jnp.ones((4, 16, 8))
    place = sw.parallel.placement(sw.mesh(mesh), rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sw.apply(layer, weights(layer, x), {}, x, place=place)
    assert ways == way


def test_heads_that_do_not_divide_are_left_to_the_ring_with_a_warning(ways, weights):
    layer, x = L.MultiHeadAttention(2), jnp.ones((4, 16, 8))
    place = sw.parallel.placement(sw.mesh("data=2,sequence=4"), "ulysses")
    with pytest.warns(sw.parallel.ShardingWarning, match="attention_heads"):
        sw.apply(layer, weights(layer, x), {}, x, place=place)
    assert ways == ["ring_attention"]
