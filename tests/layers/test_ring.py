"""Ring attention on eight simulated devices against the formula that holds every score."""

import functools
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
from attention_formula import agree, formula, uneven, with_gradients
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.attentions import ring, ring_zigzag
from sapwood.parallel.topologies import ENVIRONMENT

MESHES = {
    "sequence=8": PartitionSpec(None, "sequence", None, None),
    "data=2,sequence=2,tensor=2": PartitionSpec("data", "sequence", "tensor", None),
    "fsdp=2,sequence=4": PartitionSpec("fsdp", "sequence", None, None),
    "sequence=4,tensor=2": PartitionSpec(None, "sequence", "tensor", None),
}


def packed(batch, length, count=5):
    """Segments of uneven lengths, others in each row."""
    random = np.random.default_rng(1)
    return np.sort(random.integers(0, count, (batch, length), "int32"), 1)


def on(mesh):
    return NamedSharding(sw.mesh(mesh), MESHES[mesh])


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks on each device, of sizes that do not divide."""
    monkeypatch.setattr(ring, "BLOCK", 5)
    monkeypatch.setattr(ring, "LEAST", 1)


def compiled(mesh, q, k, causal, packs, gradients=True):
    """What calls a program of ring attention for arrays that lie on a mesh, and how many hops it holds."""
    return _compiled(mesh, q.shape, k.shape, causal, packs, gradients, (ring.BLOCK, ring.LEAST))


@functools.cache
def _compiled(mesh, q, k, causal, packs, gradients, blocks):
    sharding = on(mesh)
    rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:2]))
    keys = rows if k[2] % sharding.mesh.shape.get("tensor", 1) else sharding  # they may be too few to lie as queries do
    q, k = (jax.ShapeDtypeStruct(x, "float32", sharding=s) for x, s in ((q, sharding), (k, keys)))
    segments = [jax.ShapeDtypeStruct(q.shape[:2], "int32", sharding=rows)] if packs else []

    def forward(q, k, v, segments=None):
        return ring.ring_attention(q, k, v, causal, None, sharding, segments)

    run, dy = (with_gradients(forward), [q]) if gradients else (jax.jit(forward), [])
    arguments = [q, k, k, *dy, *segments]
    program = run.lower(*arguments).compile()

    def call(*arrays):
        return jax.device_get(program(*jax.device_put(list(arrays), [x.sharding for x in arguments])))

    return call, hops(program)


def hops(program):
    """How many permutations, and what other collectives, a compiled program holds."""
    found = r" (collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\("
    return Counter(re.findall(found, program.as_text()))


# Without a mask, k and v take one hop before the loop and one in its body. Backward, what comes before the loop is what
# forward has done; the loop passes on k, v and their gradients, which then go home. Segments go along with the keys of
# both loops. In and out of the zigzag layout arrays go in two halves each: q, k, v and y; dy, delta and three
# gradients. Segments go in, too.
FORWARD = {(False, False): 2 + 2, (False, True): 3 + 3, (True, False): 4 + 6 + 2, (True, True): 12 + 2 + 2}
BACKWARD = {(False, False): 4 + 2, (False, True): 5 + 2, (True, False): 6 + 4 + 6, (True, True): 16 + 1}


@pytest.mark.costs("a program with four loops over blocks, for eight devices")
@pytest.mark.parametrize(
    ("mesh", "causal", "packs", "kv_heads", "length", "halved"),
    [
        ("sequence=8", True, False, 1, 112, True),  # halves of 7: their last blocks are filled up
        ("sequence=8", True, True, 2, 96, True),
        ("data=2,sequence=2,tensor=2", True, True, 1, 36, True),  # fewer heads of keys than shards
        pytest.param("data=2,sequence=2,tensor=2", True, True, 2, 36, True, marks=pytest.mark.long),
        pytest.param("data=2,sequence=2,tensor=2", True, False, 1, 36, True, marks=pytest.mark.long),
        pytest.param("data=2,sequence=2,tensor=2", False, False, 4, 36, False, marks=pytest.mark.long),
        ("fsdp=2,sequence=4", False, True, 1, 52, False),
        pytest.param("fsdp=2,sequence=4", True, False, 4, 56, True, marks=pytest.mark.long),
        ("fsdp=2,sequence=4", True, True, 2, 52, False),  # 13 a device: no halves, so in order
    ],
)
def test_it_is_attention_with_the_collectives_it_needs(
    mesh, causal, packs, kv_heads, length, halved, small_blocks, draw
):
    segments = [packed(2, length)] if packs else []
    q, k, v = (np.asarray(draw(2, length, n, 8)) for n in (4, kv_heads, kv_heads))
    run, sent = compiled(mesh, q, k, causal, packs)
    agree(run(q, k, v, uneven(q), *segments), formula(q, k, v, uneven(q), causal, *segments))
    if mesh != "data=2,sequence=2,tensor=2":  # where the loop over two devices is none
        assert sent == {"collective-permute": FORWARD[halved, packs] + BACKWARD[halved, packs]}


def test_segments_need_not_be_sorted(small_blocks, draw):
    segments = np.random.default_rng(0).integers(0, 3, (2, 96), "int32")
    q, k, v = (np.asarray(draw(2, 96, n, 8)) for n in (4, 2, 2))  # as above, so that it is the same program
    run, _ = compiled("sequence=8", q, k, True, True)
    agree(run(q, k, v, uneven(q), segments), formula(q, k, v, uneven(q), True, segments))


def test_large_scores_stay_finite(small_blocks, draw):
    q, k, v = (100 * np.asarray(draw(2, 112, n, 8)) for n in (4, 1, 1))  # as above
    run, _ = compiled("sequence=8", q, k, True, False)
    assert all(np.isfinite(x).all() for x in run(q, k, v, np.ones_like(q)))


@pytest.mark.costs("a program with four loops over blocks, for eight devices")
def test_keys_of_another_length(small_blocks, draw):
    mesh = "sequence=4,tensor=2"
    q, k, v = (np.asarray(draw(2, *n, 4)) for n in ((12, 4), (28, 2), (28, 2)))
    run, sent = compiled(mesh, q, k, False, False)
    agree(run(q, k, v, uneven(q)), formula(q, k, v, uneven(q)))
    assert sent == {"collective-permute": FORWARD[False, False] + BACKWARD[False, False]}
    _, forward = compiled(mesh, q, k, False, False, gradients=False)
    assert forward == {"collective-permute": FORWARD[False, False]}


@pytest.mark.parametrize(
    ("block", "packs"),
    [
        (7, True),
        (64, False),
        pytest.param(7, False, marks=pytest.mark.long),
        pytest.param(64, True, marks=pytest.mark.long),
    ],
)
def test_on_one_device_it_is_attention_in_blocks(block, packs, monkeypatch, draw):
    monkeypatch.setattr(ring, "BLOCK", block)
    monkeypatch.setattr(ring, "LEAST", 1)
    segments = [packed(1, 30)] if packs else []
    q, k, v = (np.asarray(draw(1, 30, n, 4)) for n in (2, 1, 1))
    run = with_gradients(lambda q, k, v, *s: ring.ring_attention(q, k, v, True, 0.3, None, *s))
    agree(run(q, k, v, uneven(q), *segments), formula(q, k, v, uneven(q), True, *segments or [None], 0.3))


@pytest.mark.costs("a program with four loops over blocks, for eight devices")
@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.long), "sequence=8"])
def test_float64_stays_float64(mesh, small_blocks, draw):
    with jax.enable_x64():
        q, k, v = (np.asarray(draw(1, 96, n, 4), "float64") / 3 for n in (2, 1, 1))
        run = with_gradients(lambda q, k, v: ring.ring_attention(q, k, v, True, None, mesh and on(mesh)))
        agree(run(q, k, v, uneven(q)), formula(q, k, v, uneven(q), True), "float64", rtol=1e-11, atol=1e-13)


def test_it_is_exported_with_a_symbolic_batch(draw):
    (b,) = jax.export.symbolic_shape("b")
    run = jax.jit(lambda q, k: ring.ring_attention(q, k, k, True))
    exported = jax.export.export(run)(*(jax.ShapeDtypeStruct((b, 16, n, 4), "float32") for n in (4, 2)))
    q, k = draw(3, 16, 4, 4), draw(3, 16, 2, 4)
    np.testing.assert_allclose(exported.call(q, k), formula(q, k, k, q, True)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mesh", "packs"), [(None, True), ("sequence=8", False)])
def test_a_batch_of_nothing_gives_nothing(mesh, packs):
    q, k = np.zeros((0, 16, 4, 8), "float32"), np.zeros((0, 16, 2, 8), "float32")
    segments = np.zeros((0, 16), "int32") if packs else None
    options = {"causal": True, "sharding": mesh and on(mesh), "segments": segments}
    run = with_gradients(lambda q, k, v: L.ring_attention(q, k, v, **options))
    assert [x.shape for x in run(q, k, k, q)] == [q.shape, q.shape, k.shape, k.shape]
    assert jax.jit(lambda q, k: L.attention(q, k, k, causal=True))(q, k).shape == q.shape


@pytest.mark.costs("a program with four loops over blocks, for eight devices")
@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [
        ("bfloat16", "sequence=8"),
        ("float16", None),  # is float32 before it comes to the mesh
        pytest.param("float16", "sequence=8", marks=pytest.mark.long),
    ],
)
def test_low_precision_keeps_its_dtype_and_a_float32_softmax(dtype, mesh, draw):
    q, k, v = (draw(1, 64, 2, 8, dtype=dtype) for _ in range(3))
    run = with_gradients(lambda q, k, v: ring.ring_attention(q, k, v, True, None, mesh and on(mesh)))
    for mine, right in zip(run(q, k, v, uneven(q)), formula(q, k, v, uneven(q), True), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, "float32"), right, atol=0.06 * np.abs(right).max())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_zigzag_gives_each_device_its_halves_and_takes_them_back(n):
    mesh = Mesh(np.asarray(jax.devices()[:n]), ("x",))
    split = PartitionSpec(None, "x")

    def there(x):
        places = ring_zigzag.starts(lax.axis_index("x"), n, 3)[:, None] + jnp.arange(3)
        return ring_zigzag.enter(x, ("x",), n), places.reshape(1, -1)

    @jax.jit
    def there_and_back(x):
        moved, places = jax.shard_map(there, mesh=mesh, in_specs=split, out_specs=(split, split))(x)
        leave = jax.shard_map(lambda x: ring_zigzag.leave(x, ("x",), n), mesh=mesh, in_specs=split, out_specs=split)
        return moved, places, leave(moved)

    x = np.arange(6 * n)[None]
    moved, places, back = jax.device_get(there_and_back(x))
    np.testing.assert_array_equal(moved, places)
    np.testing.assert_array_equal(back, x)
    halves = moved.reshape(n, 2, 3)[:, :, 0] // 3
    assert [sorted(row) for row in halves.tolist()] == [[i, 2 * n - 1 - i] for i in range(n)]


def test_what_a_causal_mask_hides_is_left_out(draw):
    """Row c has a NaN among the values of half-chunk c: zero times NaN would carry it to the queries before."""
    chunks = np.arange(16)
    at = np.repeat(chunks, 4)[None, :, None, None] == chunks[:, None, None, None]
    q, k, v = (np.asarray(draw(16, 64, 1, 4)) for _ in range(3))
    run, sent = compiled("sequence=8", q, k, True, False, gradients=False)
    touched = np.isnan(run(q, k, np.where(at, np.float32("nan"), v))).reshape(16, 16, 16).any(-1)
    np.testing.assert_array_equal(touched, chunks[None, :] >= chunks[:, None])
    assert sent == {"collective-permute": FORWARD[True, False]}


@pytest.mark.parametrize("causal", [False, True])
def test_other_segments_are_left_out(causal, monkeypatch, draw):
    monkeypatch.setattr(ring, "BLOCK", 4)
    monkeypatch.setattr(ring, "LEAST", 1)
    segments = np.repeat(np.arange(4, dtype="int32"), 8)[None]
    q, k, v = (np.array(draw(1, 32, 1, 4)) for _ in range(3))
    v[:, 16] = np.nan
    run, sent = compiled("sequence=8", q, k, causal, True, gradients=False)
    y = run(q, k, v, segments)
    assert np.isfinite(y[:, :16]).all()
    assert np.isfinite(y[:, 24:]).all()
    assert np.isnan(y[:, 16:24]).any()
    assert sent == {"collective-permute": FORWARD[causal, True]}


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
    q, k = np.ones(shape, "float32"), np.ones(kv or shape, "float32")
    with pytest.raises(ValueError, match=message):
        ring.ring_attention(q, k, k, sharding=sharding)


@pytest.mark.parametrize(
    ("segments", "keys", "message"),
    [
        (np.zeros((1, 8), "float32"), 8, r"expects integers, got float32\[1,8\]"),
        (np.zeros(8, "int32"), 8, r"segments \(batch, length\) .* got segments int32\[8\]"),
        (np.zeros((1, 8), "int32"), 12, r"queries and keys that are the same positions"),
    ],
)
def test_explains_segments_that_do_not_fit(segments, keys, message):
    q, k = np.ones((1, 8, 1, 4), "float32"), np.ones((1, keys, 1, 4), "float32")
    with pytest.raises(ValueError, match=message):
        L.attention(q, k, k, segments=segments)


@pytest.mark.parametrize(
    ("causal", "length"),  # below and above what causal attention in blocks is for
    [(False, 24), (True, 24), (True, 150), pytest.param(False, 150, marks=pytest.mark.long)],
)
def test_segments_without_a_mesh(length, causal, draw):
    segments = packed(2, length)
    q, k, v = (np.asarray(draw(2, length, n, 8)) for n in (4, 2, 2))
    run = with_gradients(lambda q, k, v, segments: L.attention(q, k, v, causal=causal, segments=segments))
    right = formula(q, k, v, uneven(q), causal, segments)
    agree(run(q, k, v, uneven(q), segments), right, rtol=1e-4, atol=1e-5)


def test_segments_beside_a_mask(draw):
    segments = packed(2, 12)
    mask = (np.random.default_rng(0).random((2, 1, 12, 12)) < 0.6) | np.eye(12, dtype=bool)
    q, k, v = (np.asarray(draw(2, 12, 2, 4)) for _ in range(3))
    run = with_gradients(lambda q, k, v, segments: L.attention(q, k, v, mask, segments=segments))
    right = formula(q, k, v, uneven(q), segments=segments, mask=mask)
    agree(run(q, k, v, uneven(q), segments), right, rtol=1e-4, atol=1e-5)


def test_attention_takes_the_ring_where_a_mesh_splits_the_length(monkeypatch):
    seen = []
    monkeypatch.setattr(ring, "ring_attention", lambda *args: seen.append(args) or args[0])
    sharding = on("sequence=8")
    q, less = (jax.ShapeDtypeStruct((1, n, 2, 4), "float32") for n in (16, 9))

    def attend(q, k, *mask, **options):
        jax.eval_shape(lambda q, k: L.attention(q, k, k, *mask, **options), q, k)

    attend(q, q, causal=True, sharding=sharding)
    assert len(seen) == 1
    attend(q, q, np.ones((1, 1, 16, 16), bool), sharding=sharding)  # a general mask
    attend(q, less, sharding=sharding)  # keys that do not divide
    attend(q, q, causal=True, sharding=NamedSharding(sw.mesh("data=8"), PartitionSpec("data")))
    attend(q, q, causal=True, sharding=NamedSharding(sharding.mesh, PartitionSpec()))
    attend(q, q, causal=True)
    assert len(seen) == 1


ITSELF, CONTEXT = {"causal": True, "kv_heads": 2, "rotary": L.Rotary(), "segments": True}, {"context": True}


@pytest.mark.costs("a layer with its gradients, for eight devices and for one")
@pytest.mark.parametrize(
    ("rules", "options"),
    [
        ("default", ITSELF),
        ("default", CONTEXT),
        ("ulysses", ITSELF),
        pytest.param("ulysses", CONTEXT, marks=pytest.mark.long),
    ],
)
def test_a_layer_on_a_mesh_has_the_same_numbers(rules, options, draw, weights):
    options = dict(options)
    context = (draw(4, 8, 8),) if options.pop("context", False) else ()
    segments = packed(4, 16) if options.pop("segments", False) else None
    layer, x = L.MultiHeadAttention(4, **options), draw(4, 16, 8)
    params = weights(layer, x, *context)
    weighting = draw(4, 16, 8)

    def loss(arrays, others, place):
        params, x, *context = arrays
        segments, weighting = others
        y, _ = sw.apply(lambda v, x: layer(v, x, *context, segments=segments), params, {}, x, place=place)
        return jnp.sum(y * weighting), y

    def run(place):
        found = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
        return jax.device_get(found((params, x, *context), (segments, weighting), place))

    (_, mine), slopes = run(sw.parallel.placement(sw.mesh("data=2,sequence=4"), rules))
    (_, right), others = run(None)
    np.testing.assert_allclose(mine, right, rtol=1e-4, atol=2e-5)
    assert jax.tree.structure(slopes) == jax.tree.structure(others)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(b).max()))


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
    _, *right = formula(q, q, q, np.ones(q.shape), True)
    np.testing.assert_allclose(slope, sum(right), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packs", [False, True])
def test_at_4096_tokens_it_is_attention(packs, draw):
    segments = [packed(1, 4096, 7)] if packs else []
    q, k, v = (np.asarray(draw(1, 4096, 1, 64)) for _ in range(3))
    run, _ = compiled("sequence=8", q, k, True, packs)
    right = formula(q, k, v, uneven(q), True, *segments)
    agree(run(q, k, v, uneven(q), *segments), right, rtol=1e-4, atol=1e-5)


ON_A_TPU = """
import jax
from jax.sharding import NamedSharding, PartitionSpec
import sapwood as sw
from sapwood import layers as L
from sapwood.parallel.topologies import topology

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
@pytest.mark.fresh_compile  # as it is for a TPU
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
