"""Random keys by path: one hash along the path, folded into the run's key once.

The hash is 64 bits in two 32-bit lanes, and mixing works on Python integers and on traced arrays alike. So the key of
``blocks/3/drop`` is the same number whether 3 is a name in an unrolled stack or a traced index in a scanned one.
"""

import contextlib
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.paths import is_index

Hash = tuple[Any, Any]
"""Two 32-bit lanes: Python integers, or uint32 arrays where an index is traced."""

ROOT: Hash = (0x243F6A88, 0x85A308D3)
INDEX, FOLD, HIGH = 0x13198A2E, 0x03707344, 0x082EFA98  # tags: what kind of segment this is
AGAIN, REUSED, NEXT = 0xA4093822, 0x299F31D0, 0xEC4E6C89
WORD = 0xFFFFFFFF


def _scramble(x: Any, word: Any) -> Any:
    """A 32-bit finaliser (Wellons' lowbias32): every input bit reaches every output bit."""
    x = x ^ (x >> word(16))
    x = (x * word(0x7FEB352D)) & word(WORD)
    x = x ^ (x >> word(15))
    x = (x * word(0x846CA68B)) & word(WORD)
    return x ^ (x >> word(16))


def mix(h: Hash, segment: Hash) -> Hash:
    """The hash one segment further along a path."""
    lanes = (*h, *segment)
    if all(isinstance(x, int) for x in lanes):
        word = int
    else:
        word = np.uint32
        lanes = tuple(word(x) if isinstance(x, int) else jnp.asarray(x).astype(jnp.uint32) for x in lanes)
    a, b, c, d = lanes
    with np.errstate(over="ignore"):  # uint32 wraps around, on purpose
        a = _scramble((((a ^ c) * word(0x9E3779B1)) & word(WORD)) + b & word(WORD), word)
        b = _scramble((((b ^ d) * word(0x85EBCA77)) & word(WORD)) + a & word(WORD), word)
    return a, b


def segment(name: str) -> Hash:
    """A name as a hash; an index gives the one that its traced twin would give."""
    if is_index(name) and int(name) <= WORD:
        return int(name), INDEX
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def path_hash(path: tuple[str, ...], start: Hash = ROOT) -> Hash:
    """The hash at the end of a path."""
    for name in path:
        start = mix(start, segment(name))
    return start


def step_hash(h: Hash, i: Any) -> Hash:
    """The hash of step ``i``, an integer of 64 bits or a traced one: no two of them share a hash."""
    if isinstance(i, int):
        low, high = i & WORD, (i >> 32) & WORD
        h = mix(h, (low, FOLD))
        return mix(h, (high, HIGH)) if high else h
    low = i.astype(jnp.uint32)
    h = mix(h, (low, FOLD))
    if jnp.iinfo(i.dtype).bits == 64:
        high = (i >> 32).astype(jnp.uint32)
    elif jnp.issubdtype(i.dtype, jnp.signedinteger):
        high = jnp.where(i < 0, jnp.uint32(WORD), jnp.uint32(0))
    else:
        return h
    far = mix(h, (high, HIGH))
    return jnp.where(high == 0, h[0], far[0]), jnp.where(high == 0, h[1], far[1])


def fold(key: jax.Array, h: Hash) -> jax.Array:
    """The key at a hash, by all its 64 bits."""
    a, b = (np.uint32(x) if isinstance(x, int) else x for x in h)
    return jax.random.fold_in(jax.random.fold_in(key, a), b)


def fold_once(key: jax.Array, h: Hash) -> jax.Array:
    """The key at a hash, by all its 64 bits, at the cost of one ``fold_in``: two hashes that differ give two keys.

    Threefry, JAX's default generator, maps the 64-bit blocks one to one for each key, and a hash is one block. The keys
    of other generators take two ``fold_in``.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return fold(key, h)
    from jax.extend.random import threefry_2x32  # all of jax.extend comes with it, a sixth of the import of JAX

    block = np.array(h, np.uint32) if all(isinstance(x, int) for x in h) else jnp.stack([jnp.uint32(x) for x in h])
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(threefry_2x32((data[0], data[1]), block), impl="threefry2x32")


def as_key(key: Any) -> jax.Array:
    """A typed key from what a user has: a typed key, a raw ``uint32`` key of ``jax.random.PRNGKey``, or a seed.

    Raises `ConfigError` for anything else.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        with jax.transfer_guard("allow"):  # a seed is a number of the caller's, given on purpose
            return jax.random.key(int(key))
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
        with contextlib.suppress(TypeError):  # a raw key of another generator than the default one
            return jax.random.wrap_key_data(jnp.asarray(key))
    raise ConfigError(f"expected a random key (jax.random.key(0)) or an integer seed, got {key!r}")


class Ledger:
    """What has been drawn and forked from one key, so that nothing gets the same key twice.

    It belongs to one trace: a key closed over by another one would give every row or step the same numbers. The first
    fork of a place takes over its hash as it is (so that remat equals plain), with a ledger one ``level`` deeper; a
    place used again after that gets another hash, marked by the level, which no deeper ledger can come upon.

    ``trace`` marks where the key was made; it is None for one that came in as an operand, which is a value of its
    trace. ``alike`` has the mesh axes of a `jax.shard_map` along which all devices have this key.
    """

    __slots__ = ("__weakref__", "alike", "crossings", "draws", "folds", "forks", "level", "trace", "used")

    def __init__(self, trace: Any = None, level: Any = 0, alike: frozenset[str] = frozenset()):
        self.trace = trace
        self.level = level
        self.alike = alike
        self.crossings: dict[tuple[str, ...], tuple[tuple, set, Hash]] = {}
        self.draws: dict = {}
        self.folds: dict = {}
        self.forks: dict = {}
        self.used: dict = {}

    def _enter(self, path: tuple[str, ...]) -> int:
        """Count a use of ``path``; returns how often it, or a scope around it, was forked before."""
        prefixes = [path[:k] for k in range(len(path) + 1)]
        for prefix in prefixes:
            self.used[prefix] = self.used.get(prefix, 0) + 1
        return sum(self.forks.get(prefix, 0) for prefix in prefixes)

    def draw(self, path: tuple[str, ...], name: str, h: Hash) -> Hash:
        """The hash of the next draw called ``name`` at ``path``, whose own hash is ``h``."""
        forks = self._enter(path)
        times = self.draws.get((path, name), 0)
        self.draws[path, name] = times + 1
        h = self._again(mix(h, segment(name)), forks)
        if times:
            h = mix(h, (times, AGAIN))
        return h

    def fork(self, path: tuple[str, ...], h: Hash) -> Hash:
        """The hash a fork of ``path`` starts from: ``h`` itself the first time, another one after any other use."""
        before = self.used.get(path, 0)
        forks = self._enter(path)
        self.forks[path] = self.forks.get(path, 0) + 1
        return self._again(h, before + forks)

    def fold(self, path: tuple[str, ...], i: Any, h: Hash) -> Hash:
        """The hash of step ``i``, a number or a traced value, which is all numbers: a second loop gets other ones."""
        forks = self._enter(path)
        loops = self.folds.setdefault(path, {})
        step = i if isinstance(i, int) else None
        times = max(loops.values(), default=0) if step is None else max(loops.get(step, 0), loops.get(None, 0))
        loops[step] = times + 1  # the next free one
        return self._again(step_hash(h, i), forks + times)

    def _again(self, h: Hash, times: int) -> Hash:
        return mix(h, (times, REUSED + self.level)) if times else h

    def cross(self, path: tuple[str, ...], h: Hash, caller: tuple, again: tuple | None) -> Hash:
        """The hash with which the key of ``path`` goes into a transform, or out of one: for each crossing another one.

        `jax.jit` flattens the arguments of one call a second time where it traces. ``again`` is then the way by which
        it does, and ``caller`` the lines from which it was called, as in the first time; else ``again`` is None.
        """
        last, looks, start = self.crossings.get(path, ((), set(), h))
        if again and last == caller and again not in looks:
            looks.add(again)
            return start
        before = self.used.get(path, 0)
        fresh = not any(self.forks.get(path[:k]) for k in range(len(path) + 1))
        start = self.fork(path, h)
        if fresh and before:
            start = mix(h, (before, NEXT))  # after draws alone: the same at every level, with remat and without
        self.crossings[path] = caller, {again} if again else set(), start
        return start
