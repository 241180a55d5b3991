"""All-to-all attention on eight simulated devices against the formula that holds every score."""

import functools
import re
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import agree, formula, uneven, with_gradients
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.attentions import ring, ulysses
from sapwood.layers.attentions.ulysses import ulysses_attention

MESHES = {
    "sequence=8": PartitionSpec(None, "sequence", None, None),
    "data=2,sequence=2,tensor=2": PartitionSpec("data", "sequence", "tensor", None),
    "fsdp=2,sequence=4": PartitionSpec("fsdp", "sequence", None, None),
}


def on(mesh):
    return NamedSharding(sw.mesh(mesh), MESHES[mesh])


def packed(batch, length):
    return np.sort(np.random.default_rng(1).integers(0, 5, (batch, length), "int32"), 1)


def collectives(program):
    """How many of each a compiled program holds."""
    found = r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
    return Counter(re.findall(found, program.as_text()))


@pytest.mark.costs("attention in blocks with its gradients, for eight devices")
@pytest.mark.parametrize(
    ("mesh", "causal", "packs", "kv_heads", "length"),
    [
        ("sequence=8", True, True, 2, 40),  # fewer heads of keys than shards
        ("sequence=8", True, False, 8, 136),  # long enough for causal attention in blocks
        ("data=2,sequence=2,tensor=2", True, True, 4, 36),
        pytest.param("data=2,sequence=2,tensor=2", False, False, 2, 36, marks=pytest.mark.long),
        ("fsdp=2,sequence=4", False, True, 1, 52),
        pytest.param("fsdp=2,sequence=4", True, False, 4, 52, marks=pytest.mark.long),
    ],
)
def test_it_is_attention(mesh, causal, packs, kv_heads, length, draw):
    sharding, segments = on(mesh), [packed(2, length)] if packs else []
    q, k, v = (np.asarray(draw(2, length, n, 4)) for n in (8, kv_heads, kv_heads))
    run = with_gradients(lambda q, k, v, *s: ulysses_attention(q, k, v, causal, None, sharding, *s))
    agree(run(q, k, v, uneven(q), *segments), formula(q, k, v, uneven(q), causal, *segments))


def test_keys_of_another_length(draw):
    sharding = on("data=2,sequence=2,tensor=2")
    q, k, v = (np.asarray(draw(2, *n, 4)) for n in ((12, 8), (28, 2), (28, 2)))
    run = with_gradients(lambda q, k, v: ulysses_attention(q, k, v, sharding=sharding))
    agree(run(q, k, v, uneven(q)), formula(q, k, v, uneven(q)))


def test_bfloat16_keeps_its_dtype(draw):
    q, k, v = (np.asarray(draw(1, 64, 8, 8)) for _ in range(3))
    run = jax.jit(lambda *x: ulysses_attention(*x, True, None, on("sequence=8")))
    narrow = run(*(x.astype("bfloat16") for x in (q, k, v)))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, "float32"), formula(q, k, v, q, True)[0], atol=0.05)


@pytest.mark.slow
def test_it_runs_without_jit(sample):
    sharding = NamedSharding(sw.mesh("sequence=2", devices=jax.devices()[:2]), MESHES["sequence=8"])
    q, k, v = (sample(1, 4, 2, 4) for _ in range(3))
    y = ulysses_attention(q, k, v, sharding=sharding)
    np.testing.assert_allclose(y, formula(q, k, v, q)[0], rtol=1e-4, atol=1e-5)


WAYS = {
    "attention": (L.attention, 16),
    "causal": (lambda *x: L.attention(*x, causal=True), 128),  # long enough for blocks
    "ring": (ring.ring_attention, 16),
    "ulysses": (lambda *x: ulysses_attention(*x, sharding=on("sequence=8")), 16),
}


@pytest.mark.costs("two programs, one with gradients, for eight devices")
@pytest.mark.parametrize("way", WAYS)
def test_arrays_of_several_dtypes_are_promoted(way, draw):
    run, length = WAYS[way]
    q, k, v = (draw(1, length, 8, 4, dtype=dtype) for dtype in ("bfloat16", "float32", "float16"))
    y, *gradients = jax.device_get(with_gradients(run)(q, k, v, uneven(q)))
    assert y.dtype == jnp.float32
    assert [g.dtype for g in gradients] == ["bfloat16", "float32", "float16"]
    np.testing.assert_allclose(y, jax.jit(run)(*(np.asarray(x, "float32") for x in (q, k, v))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", [ring.ring_attention, ulysses_attention])
@pytest.mark.parametrize("sharding", [PartitionSpec(None, "sequence"), "sequence"])
def test_what_is_no_sharding(way, sharding, draw):
    x = draw(1, 16, 8, 4)
    with pytest.raises(sw.InputError, match=r"_attention: sharding is that of q, a jax.sharding.NamedSharding\(mesh"):
        way(x, x, x, sharding=sharding)


def in_float64(draw):
    return [np.asarray(draw(2, 16, n, 4), "float64") / 3 for n in (8, 4, 4)]


def test_float64_stays_float64_at_any_length(draw):
    """With and without a causal mask, segments and padding: six small computations in one program."""
    sees = np.asarray([[True] * 16, [False] * 16])[:, None, None]  # the second sequence nothing
    masks = ({}, {"segments": packed(2, 16)}, {"mask": sees})
    cases = [{"causal": causal, **mask} for causal in (True, False) for mask in masks]
    with jax.enable_x64():
        q, k, v = in_float64(draw)
        run = jax.jit(lambda *x: [with_gradients(functools.partial(L.attention, **options))(*x) for options in cases])
        for options, found in zip(cases, run(q, k, v, uneven(q)), strict=True):
            right = formula(q, k, v, uneven(q), **options)
            agree(found, right, "float64", rtol=1e-11, atol=1e-13, why=str(options))


@pytest.mark.parametrize(
    ("causal", "packs"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.long),
        pytest.param(False, True, marks=pytest.mark.long),
        pytest.param(False, False, marks=pytest.mark.long),
    ],
)
def test_float64_stays_float64_on_a_mesh(causal, packs, draw):
    segments = [packed(2, 16)] if packs else []
    with jax.enable_x64():
        q, k, v = in_float64(draw)
        run = with_gradients(lambda q, k, v, *s: ulysses_attention(q, k, v, causal, None, on("sequence=8"), *s))
        right = formula(q, k, v, uneven(q), causal, *segments)
        agree(run(q, k, v, uneven(q), *segments), right, "float64", rtol=1e-11, atol=1e-13)


def test_collectives_are_four_all_to_alls_each_way(draw):
    sharding = on("fsdp=2,sequence=4")
    q, k, v = (np.asarray(draw(2, 52, n, 4)) for n in (8, 4, 4))

    def run(q, k, v):
        return ulysses_attention(q, k, v, True, None, sharding)

    def count(f, *args):
        program = f.lower(*(jax.ShapeDtypeStruct(x.shape, "float32", sharding=sharding) for x in args)).compile()
        return collectives(program), program

    assert count(jax.jit(run), q, k, v)[0] == {"all-to-all": 4}
    sent, both = count(with_gradients(run), q, k, v, q)
    assert sent == {"all-to-all": 8}
    ours = both(*jax.device_put((q, k, v, uneven(q)), sharding))
    agree(ours, formula(q, k, v, uneven(q), True))


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
    q = np.ones((2, 16, heads, 4), "float32")
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
    layer, x = L.MultiHeadAttention(heads), np.ones((4, 16, 8), "float32")
    place = sw.parallel.placement(sw.mesh(mesh), rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lambda params, x: sw.apply(layer, params, {}, x, place=place)[0], weights(layer, x), x)
    assert ways == way


def test_heads_that_do_not_divide_are_left_to_the_ring_with_a_warning(ways, weights):
    layer, x = L.MultiHeadAttention(2), np.ones((4, 16, 8), "float32")
    place = sw.parallel.placement(sw.mesh("data=2,sequence=4"), "ulysses")
    with pytest.warns(sw.parallel.ShardingWarning, match="attention_heads"):
        jax.eval_shape(lambda params, x: sw.apply(layer, params, {}, x, place=place)[0], weights(layer, x), x)
    assert ways == ["ring_attention"]
