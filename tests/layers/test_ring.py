"""Ring attention on eight simulated devices against the formula that holds every score."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.layers import ring, zigzag
from sapwood.parallel.topology import ENVIRONMENT

MESHES = {
    "sequence=8": PartitionSpec(None, "sequence", None, None),
    "data=2,sequence=2,tensor=2": PartitionSpec("data", "sequence", "tensor", None),
    "fsdp=2,sequence=4": PartitionSpec("fsdp", "sequence", None, None),
}


def formula(q, k, v, causal=False, segments=None, scale=None):
    """softmax(q k^T * scale) v over what each query may see, every pair worked out."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = jnp.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    if segments is not None:
        scores = jnp.where((segments[:, :, None] == segments[:, None, :])[:, None], scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def packed(batch, length, count=5):
    """Segments of uneven lengths, others in each row."""
    random = np.random.default_rng(1)
    return jnp.asarray(np.sort(random.integers(0, count, (batch, length)), 1), "int32")


def on(mesh):
    return NamedSharding(sw.mesh(mesh), MESHES[mesh])


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks on each device, of sizes that do not divide."""
    monkeypatch.setattr(ring, "BLOCK", 5)
    monkeypatch.setattr(ring, "LEAST", 1)


@pytest.mark.parametrize(
    ("mesh", "causal", "packs", "kv_heads", "length"),
    [
        ("sequence=8", True, False, 1, 96),
        ("sequence=8", True, True, 2, 96),
        ("data=2,sequence=2,tensor=2", True, True, 2, 36),
        ("data=2,sequence=2,tensor=2", True, False, 1, 36),  # fewer heads of keys than shards
        ("data=2,sequence=2,tensor=2", False, False, 4, 36),
        ("fsdp=2,sequence=4", False, True, 1, 52),
        ("fsdp=2,sequence=4", True, False, 4, 56),
        ("fsdp=2,sequence=4", True, True, 2, 52),  # 13 a device: no halves, so in order
    ],
)
def test_it_is_attention(mesh, causal, packs, kv_heads, length, small_blocks, agree, draw):
    sharding, segments = on(mesh), packed(2, length) if packs else None
    agree(
        lambda q, k, v: ring.ring_attention(q, k, v, causal, None, sharding, segments),
        lambda q, k, v: formula(q, k, v, causal, segments),
        draw(2, length, 4, 8), draw(2, length, kv_heads, 8), draw(2, length, kv_heads, 8),
        rtol=2e-5, atol=5e-6, apart=True,
    )  # fmt: skip


@pytest.mark.parametrize("block", [7, 64])
@pytest.mark.parametrize("packs", [False, True])
def test_on_one_device_it_is_attention_in_blocks(block, packs, monkeypatch, agree, draw):
    monkeypatch.setattr(ring, "BLOCK", block)
    monkeypatch.setattr(ring, "LEAST", 1)
    segments = packed(1, 30) if packs else None
    agree(
        lambda q, k, v: ring.ring_attention(q, k, v, True, 0.3, None, segments),
        lambda q, k, v: formula(q, k, v, True, segments, 0.3),
        draw(1, 30, 2, 4), draw(1, 30, 1, 4), draw(1, 30, 1, 4),
        rtol=2e-5, atol=5e-6, apart=True,
    )  # fmt: skip


def test_keys_of_another_length(small_blocks, agree, draw):
    sharding = on("fsdp=2,sequence=4")
    agree(
        lambda q, k, v: ring.ring_attention(q, k, v, sharding=sharding), formula,
        draw(2, 12, 2, 4), draw(2, 28, 2, 4), draw(2, 28, 2, 4), rtol=2e-5, atol=5e-6, apart=True,
    )  # fmt: skip


@pytest.mark.parametrize("mesh", [None, "sequence=8"])
def test_float64_stays_float64(mesh, small_blocks, draw):
    with jax.enable_x64():
        q, k, v = (jnp.asarray(draw(1, 48, n, 4), "float64") / 3 for n in (2, 1, 1))
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2)))(q, k, v)
            for f in (lambda *x: ring.ring_attention(*x, True, None, mesh and on(mesh)), lambda *x: formula(*x, True))
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == "float64"
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_it_is_exported_with_a_symbolic_batch(draw):
    (b,) = jax.export.symbolic_shape("b")
    run = jax.jit(lambda q, k: ring.ring_attention(q, k, k, True))
    exported = jax.export.export(run)(*(jax.ShapeDtypeStruct((b, 16, n, 4), "float32") for n in (4, 2)))
    q, k = draw(3, 16, 4, 4), draw(3, 16, 2, 4)
    np.testing.assert_allclose(exported.call(q, k), formula(q, k, k, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mesh", "packs"), [(None, True), ("sequence=8", False)])
def test_a_batch_of_nothing_gives_nothing(mesh, packs):
    q, k = jnp.zeros((0, 16, 4, 8)), jnp.zeros((0, 16, 2, 8))
    options = {"causal": True, "sharding": mesh and on(mesh), "segments": jnp.zeros((0, 16), int) if packs else None}

    @jax.jit
    def with_gradients(q, k):
        y, pull = jax.vjp(lambda q, k: L.ring_attention(q, k, k, **options), q, k)
        return y, *pull(y)

    assert L.attention(q, k, k, causal=True).shape == q.shape
    assert [x.shape for x in with_gradients(q, k)] == [q.shape, q.shape, k.shape]


def test_segments_need_not_be_sorted(small_blocks, agree, draw):
    sharding, segments = on("sequence=8"), jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 48)))
    agree(
        lambda q, k, v: ring.ring_attention(q, k, v, True, None, sharding, segments),
        lambda q, k, v: formula(q, k, v, True, segments),
        draw(1, 48, 1, 4), draw(1, 48, 1, 4), draw(1, 48, 1, 4), rtol=2e-5, atol=5e-6, apart=True,
    )  # fmt: skip


def test_large_scores_stay_finite(small_blocks, draw):
    q, k, v = (100 * draw(1, 48, 1, 4) for _ in range(3))
    run = jax.jit(jax.value_and_grad(lambda q: ring.ring_attention(q, k, v, True, None, on("sequence=8")).sum()))
    assert all(bool(jnp.isfinite(x).all()) for x in run(q))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_its_dtype_and_a_float32_softmax(dtype, draw):
    q, k, v = (draw(1, 64, 2, 8).astype(dtype) for _ in range(3))

    def run(f, *args):
        return jax.jit(jax.value_and_grad(lambda *args: (f(*args).astype("float32") ** 2).sum(), (0, 1, 2)))(*args)

    sharding = on("sequence=8")
    _, low = run(lambda *x: ring.ring_attention(*x, True, None, sharding), q, k, v)
    _, high = run(lambda *x: formula(*x, True), *(x.astype("float32") for x in (q, k, v)))
    for mine, right in zip(low, high, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(mine.astype("float32"), right, atol=0.06 * float(jnp.abs(right).max()))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_zigzag_gives_each_device_its_halves_and_takes_them_back(n):
    mesh = Mesh(np.asarray(jax.devices()[:n]), ("x",))
    split = PartitionSpec(None, "x")

    def there(x):
        places = zigzag.starts(lax.axis_index("x"), n, 3)[:, None] + jnp.arange(3)
        return zigzag.enter(x, ("x",), n), places.reshape(1, -1)

    back = jax.shard_map(lambda x: zigzag.leave(x, ("x",), n), mesh=mesh, in_specs=split, out_specs=split)
    x = jnp.arange(6 * n)[None]
    moved, places = jax.shard_map(there, mesh=mesh, in_specs=split, out_specs=(split, split))(x)
    np.testing.assert_array_equal(moved, places)
    np.testing.assert_array_equal(back(moved), x)
    halves = np.asarray(moved).reshape(n, 2, 3)[:, :, 0] // 3
    assert [sorted(row) for row in halves.tolist()] == [[i, 2 * n - 1 - i] for i in range(n)]


def hops(f, *args):
    """How many permutations, and what other collectives, the compiled program holds."""
    text = jax.jit(f).lower(*args).compile().as_text()
    return Counter(
        re.findall(r" (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", text)
    )


@pytest.mark.parametrize(
    ("causal", "packs", "forward", "backward"),
    [
        # k and v: one hop before the loop, one in its body. Backward, what comes before the loop is what forward has
        # done; the loop passes on k, v and their gradients, which then go home.
        (False, False, 2 + 2, 4 + 2),
        # In and out of the zigzag layout in two halves each: q, k, v and y; dy, delta and three gradients.
        (True, False, 4 + 6 + 2, 6 + 4 + 6),
        # Segments go in, and along with the keys of both loops.
        (True, True, 12 + 2 + 2, 16 + 1),
    ],
)
def test_collectives_are_what_the_ring_needs_and_no_others(causal, packs, forward, backward, draw):
    sharding = NamedSharding(sw.mesh("data=2,sequence=4"), PartitionSpec("data", "sequence", None, None))
    q, k, v = (jax.device_put(draw(2, 32, 2, 4), sharding) for _ in range(3))
    segments = jax.device_put(packed(2, 32), NamedSharding(sharding.mesh, PartitionSpec("data", "sequence")))

    def run(q, k, v):
        return ring.ring_attention(q, k, v, causal, None, sharding, segments if packs else None)

    assert hops(run, q, k, v) == {"collective-permute": forward}
    both = hops(lambda q, k, v, dy: jax.vjp(run, q, k, v)[1](dy), q, k, v, q)
    assert both == {"collective-permute": forward + backward}


def test_what_a_causal_mask_hides_is_left_out(draw):
    """Row c has a NaN among the values of half-chunk c: zero times NaN would carry it to the queries before."""
    chunks = jnp.arange(16)
    at = jnp.repeat(chunks, 4)[None, :, None, None] == chunks[:, None, None, None]
    q, k, v = draw(16, 64, 1, 4), draw(16, 64, 1, 4), jnp.where(at, jnp.nan, draw(16, 64, 1, 4))
    y = jax.jit(lambda *x: ring.ring_attention(*x, True, None, on("sequence=8")))(q, k, v)
    touched = jnp.isnan(y).reshape(16, 16, 16).any(-1)
    np.testing.assert_array_equal(touched, chunks[None, :] >= chunks[:, None])


def test_other_segments_are_left_out(monkeypatch, draw):
    monkeypatch.setattr(ring, "BLOCK", 4)
    monkeypatch.setattr(ring, "LEAST", 1)
    segments = jnp.repeat(jnp.arange(4), 8)[None]
    q, k, v = draw(1, 32, 1, 4), draw(1, 32, 1, 4), draw(1, 32, 1, 4).at[:, 16].set(jnp.nan)
    for causal in (False, True):
        y = jax.jit(lambda *x: ring.ring_attention(*x, causal, None, on("sequence=8"), segments))(q, k, v)  # noqa: B023
        assert bool(jnp.isfinite(y[:, :16]).all())
        assert bool(jnp.isfinite(y[:, 24:]).all())
        assert bool(jnp.isnan(y[:, 16:24]).any())


@pytest.mark.parametrize(
    ("shape", "kv", "spec", "message"),
    [
        (
            (1, 20, 2, 4),
            None,
            MESHES["sequence=8"],
            r"20 queries do not divide over sequence=8 of mesh .*take 16 or 24",
        ),
        ((1, 16, 2, 4), (1, 20, 2, 4), MESHES["sequence=8"], r"20 keys do not divide over sequence=8"),
        ((1, 16, 3, 4), None, PartitionSpec(None, None, "sequence"), r"3 heads do not divide over sequence=8"),
    ],
)
def test_explains_sizes_that_do_not_divide(shape, kv, spec, message):
    sharding = NamedSharding(sw.mesh("sequence=8"), spec)
    q, k = jnp.ones(shape), jnp.ones(kv or shape)
    with pytest.raises(ValueError, match=message):
        ring.ring_attention(q, k, k, sharding=sharding)


@pytest.mark.parametrize(
    ("segments", "keys", "message"),
    [
        (jnp.zeros((1, 8)), 8, r"expects integers, got float32\[1,8\]"),
        (jnp.zeros((8,), int), 8, r"segments \(batch, length\) .* got segments int32\[8\]"),
        (jnp.zeros((1, 8), int), 12, r"queries and keys that are the same positions"),
    ],
)
def test_explains_segments_that_do_not_fit(segments, keys, message):
    q, k = jnp.ones((1, 8, 1, 4)), jnp.ones((1, keys, 1, 4))
    with pytest.raises(ValueError, match=message):
        L.attention(q, k, k, segments=segments)


@pytest.mark.parametrize("length", [24, 150])  # below and above what causal attention in blocks is for
@pytest.mark.parametrize("causal", [False, True])
def test_segments_without_a_mesh(length, causal, agree, draw):
    segments = packed(2, length)
    agree(
        lambda q, k, v: L.attention(q, k, v, causal=causal, segments=segments),
        lambda q, k, v: formula(q, k, v, causal, segments),
        draw(2, length, 4, 8), draw(2, length, 2, 8), draw(2, length, 2, 8), apart=True,
    )  # fmt: skip


def test_segments_beside_a_mask(agree, draw):
    segments, mask = (
        packed(2, 12),
        jnp.asarray(np.random.default_rng(0).random((2, 1, 12, 12)) < 0.6) | jnp.eye(12, dtype=bool),
    )
    both = mask & (segments[:, :, None] == segments[:, None, :])[:, None]
    agree(
        lambda q, k, v: L.attention(q, k, v, mask, segments=segments), lambda q, k, v: L.attention(q, k, v, both),
        draw(2, 12, 2, 4), draw(2, 12, 2, 4), draw(2, 12, 2, 4), apart=True,
    )  # fmt: skip


def test_attention_takes_the_ring_where_a_mesh_splits_the_length(monkeypatch, draw):
    seen = []
    monkeypatch.setattr(ring, "ring_attention", lambda *args: seen.append(args) or args[0])
    q, sharding = draw(1, 16, 2, 4), on("sequence=8")
    L.attention(q, q, q, causal=True, sharding=sharding)
    assert len(seen) == 1
    L.attention(q, q, q, jnp.ones((1, 1, 16, 16), bool), sharding=sharding)  # a general mask
    L.attention(q, q[:, :9], q[:, :9], sharding=sharding)  # keys that do not divide
    L.attention(q, q, q, causal=True, sharding=NamedSharding(sw.mesh("data=8"), PartitionSpec("data")))
    L.attention(q, q, q, causal=True, sharding=NamedSharding(sharding.mesh, PartitionSpec()))
    L.attention(q, q, q, causal=True)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "options",
    [{"causal": True, "kv_heads": 2, "rotary": L.Rotary()}, {"causal": True, "segments": True}, {"context": True}],
)
@pytest.mark.parametrize("rules", ["default", "ulysses"])
def test_a_layer_on_a_mesh_has_the_same_numbers(rules, options, draw, weights):
    options = dict(options)
    context = (draw(4, 8, 8),) if options.pop("context", False) else ()
    segments = packed(4, 16) if options.pop("segments", False) else None
    layer, x = L.MultiHeadAttention(4, **options), draw(4, 16, 8)
    params = weights(layer, x, *context)
    weighting = draw(4, 16, 8)

    def loss(params, x, place):
        y, _ = sw.apply(lambda v, x: layer(v, x, *context, segments=segments), params, {}, x, place=place)
        return jnp.sum(y * weighting), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    place = sw.parallel.placement(sw.mesh("data=2,sequence=4"), rules)
    (_, mine), slopes = run(params, x, place)
    (_, right), others = run(params, x, None)
    np.testing.assert_allclose(mine, right, rtol=1e-4, atol=2e-5)
    assert jax.tree.structure(slopes) == jax.tree.structure(others)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_a_layer_inside_a_shard_map_over_the_batch(draw, weights):
    """The mesh is partly taken: the ring goes round the axis that is left."""
    layer, x = L.MultiHeadAttention(2, causal=True), draw(4, 16, 8)
    params, mesh = weights(layer, x), sw.mesh("data=2,sequence=4")
    place = sw.parallel.placement(mesh)

    def local(params, x):
        return sw.apply(layer, params, {}, x, place=place)[0]

    split = PartitionSpec("data")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, axis_names={"data"}, check_vma=False
    )
    np.testing.assert_allclose(jax.jit(run)(params, x), jax.jit(layer)(params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_runs_without_jit(draw):
    mesh = sw.mesh("sequence=2", devices=jax.devices()[:2])
    q, sharding = draw(1, 16, 1, 4), NamedSharding(mesh, MESHES["sequence=8"])
    slope = jax.grad(lambda q: ring.ring_attention(q, q, q, True, None, sharding).sum())(q)
    right = jax.grad(lambda q: formula(q, q, q, True).sum())(q)
    np.testing.assert_allclose(slope, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packs", [False, True])
def test_at_4096_tokens_it_is_attention(packs, agree, draw):
    segments = packed(1, 4096, 7) if packs else None
    sharding = on("sequence=8")
    agree(
        lambda q, k, v: ring.ring_attention(q, k, v, True, None, sharding, segments),
        lambda q, k, v: formula(q, k, v, True, segments),
        draw(1, 4096, 1, 64), draw(1, 4096, 1, 64), draw(1, 4096, 1, 64), apart=True,
    )  # fmt: skip


ON_A_TPU = """
import jax
from jax.sharding import NamedSharding, PartitionSpec
import sapwood as sw
from sapwood import layers as L
from sapwood.parallel.topology import topology

mesh = sw.mesh("data=2,sequence=8", devices=topology("v5e:4x4"))
sharding = NamedSharding(mesh, PartitionSpec("data", "sequence", None, None))
q, k = (jax.ShapeDtypeStruct((2, 32768, n, 128), "bfloat16", sharding=sharding) for n in (8, 2))

def step(q, k, v, dy):
    y, pull = jax.vjp(lambda *x: L.attention(*x, causal=True, sharding=sharding), q, k, v)
    return y, *pull(dy)

program = jax.jit(step).lower(q, k, k, q).compile()
print(program.memory_analysis().temp_size_in_bytes)
print(program.as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
def test_on_a_tpu_the_hops_are_under_way_while_blocks_are_worked_on():
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", ON_A_TPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size, program = done.stdout.split("\n", 1)
    assert int(size) < 64 * 2**20  # the scores of a device would be 32 GiB
    assert len(re.findall(r" collective-permute-start\(", program)) == 28  # as counted above
    assert not re.search(r" (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)\(", program)
    letters = {"collective-permute-start": "s", "collective-permute-done": "d", "while": "w"}
    orders = [
        "".join(letters[step] for step in re.findall(rf" ({'|'.join(letters)})\(", computation))
        for computation in program.split("\n\n")
        if "ENTRY" not in computation
    ]
    assert sorted(order for order in orders if "s" in order) == ["sssswdddd", "sswdd"]  # the bodies of the two rings
