"""Random keys by path: the path is hashed, and the hash is folded into the run's key once.

The hash is 64 bits in two 32-bit lanes. `mix` works on Python integers and on traced arrays alike, so the key of
``blocks/3/drop`` is the same number whether 3 is a name in an unrolled stack or a traced index in a scanned one.
`Ledger` counts the uses of a key, so that no two draws, forks or crossings get the same hash. A change of the constants
or of the mixing changes the random numbers of models.
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
"""Two 32-bit lanes: Python integers, or uint32 arrays if an index of the path is traced."""

ROOT: Hash = (0x243F6A88, 0x85A308D3)
INDEX, FOLD, HIGH = 0x13198A2E, 0x03707344, 0x082EFA98  # tags that mark the kind of a segment
AGAIN, REUSED, NEXT = 0xA4093822, 0x299F31D0, 0xEC4E6C89
WORD = 0xFFFFFFFF


def _scramble(x: Any, word: Any) -> Any:
    """A 32-bit finalizer (Wellons' lowbias32): every input bit affects every output bit."""
    x = x ^ (x >> word(16))
    x = (x * word(0x7FEB352D)) & word(WORD)
    x = x ^ (x >> word(15))
    x = (x * word(0x846CA68B)) & word(WORD)
    return x ^ (x >> word(16))


def mix(h: Hash, segment: Hash) -> Hash:
    """The hash of a path extended by one segment; ``h`` is the hash of the path."""
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
    """The hash of one name. An index such as ``"3"`` gives the same hash as the traced integer 3."""
    if is_index(name) and int(name) <= WORD:
        return int(name), INDEX
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def path_hash(path: tuple[str, ...], start: Hash = ROOT) -> Hash:
    """The hash of a path; ``start`` is the hash of what lies above it."""
    for name in path:
        start = mix(start, segment(name))
    return start


def step_hash(h: Hash, i: Any) -> Hash:
    """The hash of step ``i``, a Python integer of 64 bits or a traced integer. No two steps share a hash."""
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
    """Fold all 64 bits of a hash into a key, by two ``fold_in``."""
    a, b = (np.uint32(x) if isinstance(x, int) else x for x in h)
    return jax.random.fold_in(jax.random.fold_in(key, a), b)


def fold_once(key: jax.Array, h: Hash) -> jax.Array:
    """Fold all 64 bits of a hash into a key, at the cost of one ``fold_in``. Different hashes give different keys.

    Threefry, JAX's default generator, maps the 64-bit blocks one to one for each key, and a hash is one block. The keys
    of other generators take two ``fold_in``.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return fold(key, h)
    from jax.extend.random import threefry_2x32  # late: importing jax.extend takes a sixth of the time of importing JAX

    block = np.array(h, np.uint32) if all(isinstance(x, int) for x in h) else jnp.stack([jnp.uint32(x) for x in h])
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(threefry_2x32((data[0], data[1]), block), impl="threefry2x32")


def as_key(key: Any) -> jax.Array:
    """Return a typed key unchanged; make one from a raw ``uint32`` key of ``jax.random.PRNGKey`` or an integer seed.

    Raises `ConfigError` for anything else.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        with jax.transfer_guard("allow"):  # the caller passes the seed on purpose
            return jax.random.key(int(key))
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
        with contextlib.suppress(TypeError):  # a raw key of another generator than the default one
            return jax.random.wrap_key_data(jnp.asarray(key))
    raise ConfigError(f"expected a random key (jax.random.key(0)) or an integer seed, got {key!r}")


class Ledger:
    """Counts everything drawn and forked from one key, so that no two uses get the same hash.

    A ledger belongs to one trace: if another trace closed over the key, every row or step would get the same numbers.
    The first fork of a path reuses its hash, with a new ledger one ``level`` deeper, so that remat draws what the plain
    layer draws. A later use of that path gets another hash. That hash is marked by the level, so no deeper ledger can
    produce it.

    Args:
        trace: mark of the trace that the key was made in. None for a key that entered as an operand: such a key is a
            value of its trace.
        level: nesting depth: one more for each fork, fold, stack or crossing. An integer or an array, which may be
            traced.
        alike: the mesh axes of a `jax.shard_map` along which all devices hold the same key.
    """

    __slots__ = ("__weakref__", "alike", "crossings", "draws", "folds", "forks", "level", "trace", "used")

    def __init__(self, trace: Any = None, level: Any = 0, alike: frozenset[str] = frozenset()):
        self.trace = trace
        self.level = level
        self.alike = alike
        self.crossings: dict[tuple[str, ...], tuple[tuple, set, Hash]] = {}  # path -> its last (caller, seen, hash)
        self.draws: dict = {}  # (path, name) -> number of draws
        self.folds: dict = {}  # path -> {step, None for a traced one: number of loops so far}
        self.forks: dict = {}  # path -> number of forks
        self.used: dict = {}  # path -> number of uses of it and of everything below it

    def _enter(self, path: tuple[str, ...]) -> int:
        """Count a use of ``path``. Returns how often it and the scopes around it were forked before, in sum."""
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
        """Hash for a forked cursor at ``path``, whose own hash is ``h``.

        The first fork reuses ``h``, so remat draws what the plain layer draws. If the path was used before, or a scope
        around it was forked, the fork gets a new hash.
        """
        before = self.used.get(path, 0)
        forks = self._enter(path)
        self.forks[path] = self.forks.get(path, 0) + 1
        return self._again(h, before + forks)

    def fold(self, path: tuple[str, ...], i: Any, h: Hash) -> Hash:
        """Hash of step ``i`` at ``path``, whose own hash is ``h``. A second loop over the same steps gets other hashes.

        A traced ``i`` may take any value, so it counts as a use of every step.
        """
        forks = self._enter(path)
        loops = self.folds.setdefault(path, {})
        step = i if isinstance(i, int) else None
        times = max(loops.values(), default=0) if step is None else max(loops.get(step, 0), loops.get(None, 0))
        loops[step] = times + 1  # the number of the next repeat
        return self._again(step_hash(h, i), forks + times)

    def _again(self, h: Hash, times: int) -> Hash:
        return mix(h, (times, REUSED + self.level)) if times else h

    def cross(self, path: tuple[str, ...], h: Hash, caller: tuple, again: tuple | None) -> Hash:
        """Hash with which the key of ``path`` enters or leaves a transform. Each crossing gets a new hash.

        `jax.jit` flattens the arguments of one call a second time if it traces. The second time returns the hash of the
        first, so that a call gives the same numbers whether it traces or not.

        Args:
            path: the path of the cursor.
            h: the hash of that path.
            caller: the call stack from the user's line into JAX; the same for both times.
            again: the call stack inside of JAX from which the second flattening comes; None for any other one.
        """
        last, looks, start = self.crossings.get(path, ((), set(), h))
        if again and last == caller and again not in looks:
            looks.add(again)
            return start
        before = self.used.get(path, 0)
        fresh = not any(self.forks.get(path[:k]) for k in range(len(path) + 1))
        start = self.fork(path, h)
        if fresh and before:
            start = mix(h, (before, NEXT))  # after draws only: no level, so remat changes nothing
        self.crossings[path] = caller, {again} if again else set(), start
        return start
