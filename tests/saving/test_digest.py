"""Digests against the formula in plain Python, and every way in which an array can be wrong or laid out."""

import functools
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from sapwood.saving import digest
from sapwood.saving.digest import combine, digests, named_leaves, tree_digest

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


def oracle(words: np.ndarray, rule: int = 2) -> list[int]:
    """The module docstring's formula over Python integers, element by element; or that of rule 1."""
    seed, odd, odd2 = digest._SEED.tolist(), digest._ODD.tolist(), digest._ODD2.tolist()
    lanes = [0] * 4
    for s in range(4):
        for index in np.ndindex(words.shape):
            rows = [mix(i + mix((seed[s] + 0x632BE5AB * d) & M) & M) for d, i in enumerate(index)]
            w = int(words[index])
            if rule == 1:
                h = (w ^ sum(rows) & M) * odd[s] & M
                lanes[s] = (lanes[s] + (h ^ (h >> 16)) * odd2[s]) & M
            else:
                key = 1 + sum(row & ~1 for row in rows) & M
                w = (w ^ w >> 16) * 0x85EBCA6B & M
                h = ((w ^ w >> 16 - s) ^ key) * key & M
                lanes[s] = (lanes[s] + (h ^ h >> 16)) & M
    return lanes


def bits_of(x: np.ndarray) -> np.ndarray:
    """Each element's little-endian 32-bit words, from its bytes."""
    size = x.dtype.itemsize
    rows = [x[i].tobytes().ljust(-(-size // 4) * 4, b"\0") for i in np.ndindex(x.shape)]
    words = np.array([np.frombuffer(row, "<u4") for row in rows], np.uint32)
    return words.reshape(*x.shape, -1) if size > 4 else words.reshape(x.shape)


def one(x, rule=digest.RULE) -> str:
    return digests({"x": x}, rule)["x"]


DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16"]
DTYPES += ["bfloat16", "float32", "complex64"]
NARROW = ["int4", "uint4", "int2", "uint2", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]
WIDE = ["int64", "uint64", "float64", "complex128"]


PAIRED = ["int4", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"]


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
    if np.size(x) == 0:  # whose words are in no dimension of it
        assert one(jnp.asarray(x, "complex64")) == one(np.asarray(x, "complex64")) != one(x)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float32", ()), ("bool", (7,)), ("bfloat16", (2, 3)), ("complex64", (2, 2))]
)
def test_the_rule_of_what_was_written_before(dtype, shape, where):
    x = sample(dtype, shape or (1,)).reshape(shape)
    expected = digest._hex(x, np.array(oracle(bits_of(x), rule=1), np.uint32))
    assert one(jnp.asarray(x), 1) == one(x, 1) == expected != one(x)


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


# Changes that might cancel


@functools.partial(jax.jit, static_argnames="rule")
def lanes_by_device(batch, rows, columns, rest, rule):
    one = jax.vmap(lambda x, i, j: digest._device_lanes(x, [i, j, *rest], rule))
    return jnp.stack(one(batch, rows, columns), -1)


def lanes_of(batch, corner, rule=digest.RULE) -> np.ndarray:
    """The lanes of each array of a batch (count, n, n), (count, lanes), as part of a large one that is zero elsewhere.

    `corner` (count, 2) says where it stands there, so that keys of many places are used.
    """
    (rows, columns), n = (digest._table(dim, 1 << 14, rule) for dim in (0, 1)), np.arange(batch.shape[1])
    rows, columns = (t[:, c[:, None] + n].swapaxes(0, 1) for t, c in zip((rows, columns), corner.T, strict=True))
    rest = digest._tables(jax.ShapeDtypeStruct(batch.shape[1:], batch.dtype), rule)[2:]
    return np.asarray(lanes_by_device(batch, rows, columns, rest, rule))


def bits(x: np.ndarray) -> np.ndarray:
    """The elements as unsigned integers; of complex numbers their parts."""
    return x.view(f"uint{8 * x.dtype.itemsize // (2 if x.dtype.kind == 'c' else 1)}")


def normals(rng, dtype: str, count: int) -> np.ndarray:
    """(count, 4, 4) normal numbers as that dtype has them."""
    x = 3 * rng.normal(size=(count, 4, 4))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype == "bool":
        return x > 0
    if kind.kind == "c":
        x = x + 3j * rng.normal(size=x.shape)
    return (np.abs(x) if "uint" in dtype or "e8m0" in dtype else x).astype(kind)


def flipped(rng, x, places: int, pattern) -> np.ndarray:
    """So many elements of each array with the bits of that pattern (one for each array) flipped."""
    y = x.copy()
    flat = bits(y).reshape(len(y), -1)
    chosen = rng.random(flat.shape).argsort(1)[:, :places]
    flat[np.arange(len(y))[:, None], chosen] ^= np.broadcast_to(pattern, len(y)).astype(flat.dtype)[:, None]
    return y


def shuffled(rng, x, places: int) -> np.ndarray:
    """The first `places` elements of each array, in an order of chance, in each other's place."""
    order = rng.random((len(x), x[0].size)).argsort(1)
    y = x.reshape(len(x), -1).copy()
    n = np.arange(len(x))[:, None]
    y[n, order[:, :places]] = y[n, np.roll(order[:, :places], 1, 1)]
    return y.reshape(x.shape)


def changes(rng, dtype: str, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Arrays (count, 4, 4), beside what may become of them."""
    x = normals(rng, dtype, count)
    width = 1 if dtype == "bool" else jax.dtypes.itemsize_bits(x.dtype) // (2 if x.dtype.kind == "c" else 1)
    bit, top = np.uint64(1) << rng.integers(0, width, count).astype(np.uint64), 1 << (width - 1)
    skew = x if dtype == "bool" or "e8m0" in dtype else (x - x.swapaxes(1, 2)).astype(x.dtype)
    few = rng.choice(x[0].ravel()[:3], x.shape)  # three values
    zeros = np.zeros_like(x)
    return {
        "one bit of two elements": (x, flipped(rng, x, 2, bit)),
        "one bit of four": (x, flipped(rng, x, 4, bit)),
        "two signs": (x, flipped(rng, x, 2, top)),
        "two signs of zeros": (zeros, flipped(rng, zeros, 2, top)),
        "every sign": (x, flipped(rng, x, x[0].size, top)),
        "two change places": (x, shuffled(rng, x, 2)),
        "all change places": (x, shuffled(rng, x, x[0].size)),
        "three values in another order": (few, shuffled(rng, few, 8)),
        "transposed": (x, x.swapaxes(1, 2)),
        "antisymmetric, transposed": (skew, skew.swapaxes(1, 2)),
        "rows in another order": (x, x[:, rng.permutation(4)]),
        "moved by one": (x, np.roll(x, 1, 2)),
    }


def misses(dtype: str, count: int, seed: int, rule: int = digest.RULE) -> dict[str, np.ndarray]:
    """Of each kind of change: pairs that differ, those with one digest, and single lanes that are equal."""
    found, rng = {}, np.random.default_rng(seed)
    corner = rng.integers(0, (1 << 14) - 4, (count, 2))
    for name, pair in changes(rng, dtype, count).items():
        old, new = (np.ascontiguousarray(x) for x in pair)
        other = (old.view(np.uint8) != new.view(np.uint8)).reshape(count, -1).any(1)
        same = (lanes_of(old, corner, rule) == lanes_of(new, corner, rule))[other]
        found[name] = np.array([other.sum(), same.all(1).sum(), same.sum()])
    return found


def test_changes_of_several_elements_do_not_cancel():
    """Rule 1 missed one pair of flipped signs in 16; now not even one lane of four is missed."""
    found = misses("float32", 4000, 0)
    assert all(seen > 3000 for seen, _, _ in found.values())
    assert not sum(found.values())[1:].any(), found
    before = misses("float32", 4000, 0, rule=1)  # and that this test can see
    assert before["two signs"][1] > 100
    assert before["antisymmetric, transposed"][1] > 0


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES + PAIRED + WIDE)
def test_a_million_changes_of_each_dtype(dtype):
    """`pytest -m long tests/saving/test_digest.py -k million -s` prints the table."""
    with jax.enable_x64(dtype in WIDE):
        found = sum(sum(misses(dtype, 12_000, seed).values()) for seed in range(8))
    print(f"{dtype}: {found[0]:,} changes, {found[1]} unseen; {found[2]} of {4 * found[0]:,} lanes unchanged")
    assert found[1] == 0
    assert found[2] <= 4  # by chance 0.001; more would tell of a pattern
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for _, x in changes(np.random.default_rng(0), dtype, 64).values():
        with jax.enable_x64(dtype in WIDE):
            placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            lanes = digest._device_lanes(placed, digest._tables(placed, 2), 2)
            assert digest._host_lanes(x, 2).tolist() == [int(lane) for lane in lanes]


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
    program = digest._device_lanes.lower(x, digest._tables(x, 2), 2).compile()
    crossing = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-\w+|collective-\w+)", program.as_text())
    assert crossing, "eight devices have to add up their sums"
    assert all(np.prod([int(n) for n in dims.split(",") if n]) <= 8 for dims in crossing), crossing
    assert program.memory_analysis().temp_size_in_bytes < 100_000  # a shard has 262,144 bytes


@pytest.mark.parametrize("shape", [(digest._BLOCK + 5,), (3, digest._BLOCK - 1), (70, 40, 40)])
def test_the_host_takes_an_array_in_blocks(shape, monkeypatch):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    in_blocks = [digest._host_lanes(x, rule).tolist() for rule in (1, 2)]
    monkeypatch.setattr(digest, "_BLOCK", 1 << 40)
    assert in_blocks == [digest._host_lanes(x, rule).tolist() for rule in (1, 2)]


def test_a_long_dimension_needs_no_table():
    x = jnp.arange(digest._TABLE + 3, dtype=jnp.int32)
    assert digest._tables(x, 2) == [None]
    assert (
        digest._lanes([jnp.broadcast_to(x, (20, x.size))])[0].tolist()
        == digest._host_lanes(np.broadcast_to(np.asarray(x), (20, x.size)), 2).tolist()
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
    blocks = (1 << 20) // digest._BLOCK  # that fit a cache; each takes no more than a small array
    assert blocks <= 16
    assert lines(np.ones((1024, 1024), "float32")) <= blocks * lines(np.ones((4, 4), "float32"))
    assert lines(beyond) < 5000
