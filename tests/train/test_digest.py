"""Digests against the formula in plain Python, and every way in which an array can be wrong or laid out."""

import itertools
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from sapwood.train import digest
from sapwood.train.digest import combine, digests, named_leaves, tree_digest

M = 0xFFFFFFFF


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """Run the test once through NumPy and once through XLA."""
    monkeypatch.setattr(digest, "HOST_ELEMENTS", 1 << 40 if request.param == "host" else -1)
    return request.param


def mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B & M
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & M
    return h ^ (h >> 16)


def oracle(words: np.ndarray) -> list[int]:
    """The module docstring's formula over Python integers, element by element."""
    seed, odd, odd2 = digest._SEED.tolist(), digest._ODD.tolist(), digest._ODD2.tolist()
    lanes = [0] * 4
    for s in range(4):
        for index in np.ndindex(words.shape):
            place = sum(mix(i + mix((seed[s] + 0x632BE5AB * d) & M) & M) for d, i in enumerate(index)) & M
            h = (int(words[index]) ^ place) * odd[s] & M
            lanes[s] = (lanes[s] + (h ^ (h >> 16)) * odd2[s]) & M
    return lanes


def bits_of(x: np.ndarray) -> np.ndarray:
    """Each element's little-endian 32-bit words, from its bytes."""
    size = x.dtype.itemsize
    rows = [x[i].tobytes().ljust(-(-size // 4) * 4, b"\0") for i in np.ndindex(x.shape)]
    words = np.array([np.frombuffer(row, "<u4") for row in rows], np.uint32)
    return words.reshape(*x.shape, -1) if size > 4 else words.reshape(x.shape)


def one(x) -> str:
    return digests({"x": x})["x"]


DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16"]
DTYPES += ["bfloat16", "float32", "complex64"]
NARROW = ["int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]
WIDE = ["int64", "uint64", "float64", "complex128"]


def sample(dtype: str, shape=(3, 2, 5)) -> np.ndarray:
    rng = np.random.default_rng(0)
    top = 2 if dtype in ("bool", "int2", "uint2") else 7
    x = rng.integers(0, top, shape) + (rng.random(shape) if top == 7 else 0)
    return x.astype(getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, dtype) else dtype)


@pytest.mark.parametrize("dtype", DTYPES + NARROW)
def test_every_dtype_is_the_formula(dtype, where):
    x = sample(dtype)
    lanes = oracle(bits_of(x))
    expected = digest._hex(x, np.array(lanes, np.uint32))
    assert one(jnp.asarray(x)) == expected
    assert one(x) == expected


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_dtypes(dtype, where):
    x = sample(dtype, (2, 3))
    expected = digest._hex(x, np.array(oracle(bits_of(x)), np.uint32))
    assert one(x) == expected  # NumPy, where JAX has no such dtype without x64
    with jax.enable_x64(True):
        assert one(jnp.asarray(x)) == expected


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7,), (2, 3, 4, 5, 2)])
def test_shapes(shape, where):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert one(jnp.asarray(x)) == digest._hex(x, np.array(oracle(bits_of(x)), np.uint32))


def test_shape_and_dtype_are_part_of_it(where):
    shapes = [(), (1,), (0,), (6,), (2, 3), (3, 2), (1, 6)]
    zeros = [np.zeros(shape, dtype) for shape in shapes for dtype in ["float32", "int32", "int8"]]
    assert len({one(jnp.asarray(x)) for x in zeros}) == len(zeros)


def test_typed_keys(where):
    key = jax.random.key(7)
    assert one(key) == one(jax.random.key(7)) != one(jax.random.key(8))
    assert one(jax.random.split(key, 3)) != one(jax.random.key_data(jax.random.split(key, 3)))
    assert one(jax.random.key(7, impl="rbg")) != one(jax.random.key(7, impl="unsafe_rbg"))


def test_each_single_bit_counts_in_every_lane(where):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, (2, 2), dtype=np.uint32)
    lanes = digest._lanes([jnp.asarray(x)])[0]
    for index in np.ndindex(x.shape):
        for bit in range(32):
            y = x.copy()
            y[index] ^= np.uint32(1 << bit)
            assert (digest._lanes([jnp.asarray(y)])[0] != lanes).all()


def test_swaps_shifts_and_transposes_count(where):
    x = np.arange(1, 37, dtype=np.float32).reshape(6, 6)
    seen = {one(jnp.asarray(x))}
    changed = [x.T, x[::-1], x[:, ::-1], np.roll(x, 1), np.roll(x, 1, 0), np.roll(x, 1, 1)]
    for i, j in itertools.combinations(range(0, 36, 5), 2):
        y = x.flatten()
        y[[i, j]] = y[[j, i]]
        changed.append(y.reshape(6, 6))
    for y in changed:
        seen.add(one(jnp.asarray(y)))
    assert len(seen) == 1 + len(changed)


def test_signed_zero_and_nan_payloads(where):
    nan = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    different = [np.float32([0.0]), np.float32([-0.0]), *[x[None] for x in nan]]
    assert len({one(jnp.asarray(x)) for x in different}) == len(different)


def test_same_under_every_sharding(where):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (16, 8, 3))
    expected = one(np.asarray(x))
    specs = [(), ("data",), ("fsdp", "data"), (None, ("data", "fsdp")), (("fsdp", "data"),)]
    for spec in specs:
        assert one(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) == expected
    keys = jax.random.split(jax.random.key(1), 8)
    assert one(jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))) == one(keys)


def test_arrays_in_host_memory_of_any_size():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.arange(digest.HOST_ELEMENTS + 8, dtype=jnp.float32).reshape(8, -1)
    for sharding in (NamedSharding(mesh, PartitionSpec("data")), SingleDeviceSharding(jax.devices()[0])):
        host = jax.device_put(x, sharding.with_memory_kind("pinned_host"))
        assert digests({"x": host, "y": x}) == dict.fromkeys("xy", one(np.asarray(x)))
        assert host.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "bool", "int4", "float8_e4m3fn"])
def test_every_kind_of_dtype_in_host_memory(dtype, where):
    x = jnp.asarray(sample(dtype))
    assert one(jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))) == one(x)
    key = jax.random.key(3)
    assert one(jax.device_put(key, key.sharding.with_memory_kind("pinned_host"))) == one(key)


def test_a_sharded_array_is_not_gathered():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((1024, 512)), NamedSharding(mesh, PartitionSpec("fsdp")))
    program = digest._device_lanes.lower(x, digest._tables(x)).compile()
    crossing = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-\w+|collective-\w+)", program.as_text())
    assert crossing, "eight devices have to add up their sums"
    assert all(np.prod([int(n) for n in dims.split(",") if n]) <= 8 for dims in crossing), crossing
    assert program.memory_analysis().temp_size_in_bytes < 100_000  # a shard has 262,144 bytes


def test_a_long_dimension_needs_no_table():
    x = jnp.arange(digest._TABLE + 3, dtype=jnp.int32)
    assert digest._tables(x) == [None]
    assert (
        digest._lanes([jnp.broadcast_to(x, (20, x.size))])[0].tolist()
        == digest._host_lanes(np.broadcast_to(np.asarray(x), (20, x.size))).tolist()
    )


def test_trees():
    tree = {"a": jnp.ones(3), "b": [jnp.zeros((), jnp.int32), (np.float64(2.5), None)]}
    assert list(named_leaves(tree)) == ["a", "b/0", "b/1/0"]
    assert len(tree_digest(tree)) == 32
    assert tree_digest(tree) == tree_digest(jax.tree.map(lambda x: x, tree))
    assert tree_digest(tree) != tree_digest({"a": tree["a"], "c": tree["b"]})
    parts = digests(named_leaves(tree))
    assert tree_digest(tree) == combine(dict(reversed(parts.items())))
    with pytest.raises(ValueError, match="two leaves of the tree have the path 'a/b'"):
        named_leaves({"a": {"b": 1}, "a/b": 2})


def test_a_large_array_takes_no_more_python_than_a_small_one():
    """A loop over its elements or rows would. Lines that run are counted, of all that is called."""

    def lines(x):
        one(x)  # compiles what there is to compile
        count = itertools.count()

        def seen(frame, event, argument):
            next(count)
            return seen

        before = sys.gettrace()
        sys.settrace(seen)
        try:
            one(x)
        finally:
            sys.settrace(before)
        return next(count)

    beyond = jnp.ones((2048, digest.HOST_ELEMENTS // 2048 + 1))
    assert lines(np.ones((1024, 1024), "float32")) <= lines(np.ones((4, 4), "float32")) + 50
    assert lines(beyond) < 5000
