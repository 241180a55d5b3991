"""Digests: 128 bits per array that depend on its bits, shape and dtype, and not on its sharding.

A digest is the BLAKE2b hash of the dtype, the shape and four sums of 32 bits, the lanes (JAX has no 64-bit integers by
default). The bits of each element are mixed with a key of the element's place, and the results are added up in each
lane. Sums can be computed in any order and on any mesh. On a mesh each device sums its own shards, and four numbers per
array cross devices; no array is gathered. All arithmetic is modulo 2^32. In lane s:

    key[i, j, ...] = 1 + even(mix(i + seed(s, 0))) + even(mix(j + seed(s, 1))) + ...     one table per dimension
    w              = (bits XOR bits >> 16) * odd                                         the same in every lane
    h              = ((w XOR w >> (16 - s)) XOR key) * key
    lane[s]        = sum over elements of (h XOR h >> 16)

`mix` is the finalizer of MurmurHash3 (Appleby, 2011). `even` clears the lowest bit, so keys are odd. The hash belongs
to the family of Zobrist hashing and of additive incremental hashes (Bellare and Micciancio, 1997). A sum does not
detect changes that cancel, so a good hash is one in which the changes of two elements rarely cancel:

- One changed element is always detected, in every lane: at a given place each step is a bijection.
- Two elements that change alike (two flipped signs, two numbers that swap places): each lane changes twice, by amounts
  that depend on the keys of both places. With random keys all four lanes cancel for about one pair of places in 2^108
  for usual values, and in 2^72 for the worst values found.
- The same holds for more than two changes, if the changes do not depend on the keys. Anyone who knows the keys can
  forge a digest: a digest detects accidents and is not a signature.

The formula ends with an XOR. A product with an odd constant after it would only multiply the sum by that constant, and
detect nothing more. Without the XOR, a flipped sign bit changes each lane by one of two amounts, and one pair of
flipped signs in 16 cancels. The same holds for rule 1, the formula of Sapwood 0.1, which multiplies by the same factor
at all places. Rule 1 is kept to verify digests that Sapwood 0.1 wrote.

An index is mixed per dimension, so arrays of more than 2^32 elements need no wider integer. Elements wider than 32 bits
become a last dimension of 32-bit words, and narrower ones are widened. So -0.0 differs from 0.0, and NaNs with
different bits differ.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RULE = 2
"""The current rule for computing digests. Files store the rule of their digests; a file without one uses rule 1."""

LANES = 4
# All factors are odd, so that multiplication is invertible modulo 2^32. Beyond that, these numbers only need to differ.
_SEED = np.array([0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F], np.uint32)
_ODD = np.array([0x2545F491, 0x165667B1, 0xCC9E2D51, 0x1B873593], np.uint32)
_MULTIPLIER = np.uint32(0x85EBCA6B)
_ODD2 = np.array([0x85EBCA77, 0xC2B2AE3D, 0x9E3779B1, 0x27D4EB2D], np.uint32)

# Trees with at most this many elements on devices are hashed by NumPy, which ends before XLA has compiled a program.
HOST_ELEMENTS = 1 << 20
# A longer dimension is mixed inside the program, because its table could be as large as the array.
_TABLE = 1 << 16
# Words that NumPy mixes at once. They fit into the CPU's cache, which halves the time.
_BLOCK = 1 << 16


def describe(x: Any) -> tuple[str, tuple[int, ...]]:
    """The dtype's name and the shape of an array, as they enter its digest. The dtype of a typed key is `key<impl>`.

    >>> describe(np.zeros((2, 3), "float32")), describe(jax.random.key(0))
    (('float32', (2, 3)), ('key<fry>', ()))
    """
    return str(x.dtype), tuple(x.shape)


def _mix(h: Any) -> Any:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _seeds(dim: int) -> np.ndarray:
    return _mix(_SEED + np.uint32(0x632BE5AB * dim & 0xFFFFFFFF))


def _rows(index: Any, seeds: Any, rule: int) -> Any:
    """The part of the key that the index along one dimension contributes."""
    mixed = _mix(index + seeds)
    return mixed if rule == 1 else mixed & np.uint32(0xFFFFFFFE)


@functools.lru_cache(maxsize=256)
def _table(dim: int, size: int, rule: int) -> np.ndarray:
    """The key parts of all indices of one dimension, uint32 `(lanes, size)`."""
    return _rows(np.arange(size, dtype=np.uint32), _seeds(dim)[:, None], rule)


def _spread(words: Any, rule: int) -> Any:
    """The first mixing step, which all lanes share: `w` of the formula."""
    return words if rule == 1 else (words ^ (words >> 16)) * _MULTIPLIER


def _hashed(words: Any, key: Any, lane: int, rule: int) -> Any:
    """The number that each element adds to a lane. The arguments are not changed.

    The operators `^=` and `*=` reuse the memory of `h` if the arguments are NumPy arrays.
    """
    if rule == 1:
        h = words ^ key
        h *= _ODD[lane]
        h ^= h >> 16
        h *= _ODD2[lane]
        return h
    h = words >> (16 - lane)
    h ^= words
    h ^= key
    h *= key
    h ^= h >> 16
    return h


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; elements of 64 or 128 bits get a last dimension of words."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        parts = _words(jnp.stack([x.real, x.imag], -1))
        return parts.reshape(*x.shape, x.dtype.itemsize // 4)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)


@functools.partial(jax.jit, static_argnames="rule")
def _device_lanes(x: jax.Array, tables: list[np.ndarray | None], rule: int) -> list[jax.Array]:
    # Arrays in host memory (an offloaded optimizer state) are copied to the device by the program that reads them.
    # Programs run one after the other, so the device holds one such array at a time. Arrays on the device do not move.
    words = _spread(_words(jax.device_put(x, jax.memory.Space.Device)), rule)
    mixed = []
    for lane in range(LANES):
        key = jnp.uint32(rule > 1)
        for dim, (size, table) in enumerate(zip(words.shape, tables, strict=True)):
            row = _rows(jnp.arange(size, dtype=jnp.uint32), _seeds(dim)[lane], rule) if table is None else table[lane]
            key = key + row.reshape([-1 if d == dim else 1 for d in range(words.ndim)])
        mixed.append(_hashed(words, key, lane, rule))
    # One reduction of four operands: XLA's CPU compiler fuses it with the operations before it (64 MB in 12 ms, no
    # memory). Four reductions would each write their operand out first (260 ms, the memory of four arrays).
    return jax.lax.reduce(mixed, [np.uint32(0)] * LANES, _add, tuple(range(words.ndim)))


def _add(a: Any, b: Any) -> list[Any]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _tables(x: jax.Array, rule: int) -> list[np.ndarray | None]:
    bits = jax.dtypes.itemsize_bits(x.dtype)
    shape = (*x.shape, bits // 32) if bits > 32 else x.shape
    return [_table(dim, size, rule) if size <= _TABLE else None for dim, size in enumerate(shape)]


def _host_words(x: np.ndarray) -> np.ndarray:
    """`_words` in NumPy."""
    if x.dtype == np.bool_:
        return x.astype(np.uint32)
    if x.dtype.itemsize > 4:
        return np.ascontiguousarray(x[..., None]).view(np.uint32)
    words = x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    # NumPy stores an element below 8 bits in a byte whose upper bits do not belong to it.
    bits = jax.dtypes.itemsize_bits(x.dtype)
    return words & np.uint32((1 << bits) - 1) if bits < 8 else words


def _host_lanes(x: np.ndarray, rule: int) -> np.ndarray:
    words = np.asarray(_host_words(x))
    shape, words = words.shape, np.atleast_1d(words)
    lanes = np.zeros(LANES, np.uint32)
    step = max(1, _BLOCK // max(1, words[:1].size))
    for start in range(0, len(words), step):
        rows = slice(start, start + step)
        block = _spread(words[rows], rule)
        for lane in range(LANES):
            key = np.full([1] * words.ndim, rule > 1, np.uint32)
            for dim, size in enumerate(shape):
                row = _table(dim, size, rule)[lane][rows if dim == 0 else slice(None)]
                key = key + row.reshape([-1 if d == dim else 1 for d in range(words.ndim)])
            lanes[lane : lane + 1] += _hashed(block, key, lane, rule).sum(dtype=np.uint32)
    return lanes


def _whole(x: Any) -> Any:
    """The array, or a shard that holds all of it, for `jax.device_get`; None if no process holds all of it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    return x.addressable_data(0) if x.is_fully_replicated else None


def _lanes(arrays: list[Any], rule: int = RULE) -> list[np.ndarray]:
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in arrays]
    whole = [_whole(x) for x in arrays]
    on_device = [isinstance(x, jax.Array) for x in arrays]
    size = sum(x.size for x in itertools.compress(arrays, on_device))
    if size <= HOST_ELEMENTS and all(x is not None for x in whole):
        return [_host_lanes(np.asarray(x), rule) for x in jax.device_get(whole)]
    # One program per shape and dtype, not one per tree: compilation dominates, and the layers of a network share
    # programs with each other and with their moments.
    pairs = zip(arrays, on_device, strict=True)
    lanes = [
        _device_lanes(x, _tables(x, rule), rule) if there else _host_lanes(np.asarray(x), rule) for x, there in pairs
    ]
    return [np.asarray(four) for four in jax.device_get(lanes)]


def digests(arrays: Mapping[str, Any], rule: int = RULE) -> dict[str, str]:
    """The digest of each array: 32 hexadecimal digits over its bits, shape and dtype.

    Arrays on devices are hashed there and not gathered. Trees with at most `HOST_ELEMENTS` elements on devices are
    hashed on the host, which compiles no program; the digests are the same. In a run of several processes all of them
    must call it.

    Args:
        arrays: maps names to `jax.Array`s with any sharding (typed PRNG keys too) or NumPy arrays.
        rule: the rule of the digests, 1 for what Sapwood 0.1 wrote. Digests of different rules must not be compared.

    >>> digests({"w": np.ones(3, "float32")}) == digests({"w": jnp.ones(3)})
    True
    >>> digests({"w": np.float32([0.0])}) == digests({"w": np.float32([-0.0])})
    False
    """
    lanes = _lanes(list(arrays.values()), rule)
    return {name: _hex(x, four) for (name, x), four in zip(arrays.items(), lanes, strict=True)}


def _hex(x: Any, lanes: np.ndarray) -> str:
    dtype, shape = describe(x)
    text = f"{dtype}{list(shape)}:{''.join(f'{lane:08x}' for lane in lanes.tolist())}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, such as `"opt_state/0/mu/stem/kernel"`, in the order of the pytree.

    Raises ValueError if two leaves have the same path (because of a slash in a name, or keys `1` and `"1"`).

    >>> list(named_leaves({"stem": {"kernel": 1, "bias": 2}, "blocks": [3]}))
    ['blocks/0', 'stem/bias', 'stem/kernel']
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"
        if name in leaves:
            raise ValueError(f"two leaves of the tree have the path {name!r}; rename one of them")
        leaves[name] = leaf
    return leaves


def tree_digest(tree: Any) -> str:
    """One digest for a whole pytree: 32 hexadecimal digits over its paths and the digest of each leaf.

    >>> tree_digest({"w": jnp.ones(3)}) == tree_digest({"kernel": jnp.ones(3)})
    False
    """
    return combine(digests(named_leaves(tree)))


def combine(parts: Mapping[str, str]) -> str:
    """The digest of a tree, computed from the digests of its leaves by path. Their order does not matter.

    >>> combine({"a": "1", "b": "2"}) == combine({"b": "2", "a": "1"})
    True
    """
    text = "".join(f"{name}\0{parts[name]}\n" for name in sorted(parts))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
