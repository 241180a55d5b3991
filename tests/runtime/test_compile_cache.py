"""The cache of compiled programs: what is kept where, what is put back afterwards, and that programs stay the same."""

import itertools
import os
import subprocess
import sys
import time
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import compilation_cache

from sapwood import ConfigError
from sapwood.runtime import compile_cache, compile_cache_entries
from sapwood.saving.digest import tree_digest
from sapwood.train import Trainer, supervised

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
)


def entries(directory):
    return sorted(path.name for path in directory.glob("*-cache"))


def fit(**options):
    def model(v, x):
        return x @ v.head.param("kernel", (4, 3), jax.nn.initializers.zeros)

    data = {"x": np.eye(4, dtype="float32"), "label": np.arange(4) % 3}
    trainer = Trainer(supervised(model, inputs="x"), optax.adam(0.1))
    return trainer.fit(data, steps=6, batch_size=2, progress=False, **options)


@pytest.mark.fresh_compile
@pytest.mark.costs("the programs of two runs have to be compiled anew")
def test_fit_keeps_its_programs_and_puts_the_settings_back(tmp_path):
    before = [getattr(jax.config, name) for name in SETTINGS]
    plain = fit()
    cold = fit(compile_cache=tmp_path / "programs")
    kept = entries(tmp_path / "programs")
    assert any("train_step" in name for name in kept)
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    assert entries(tmp_path / "programs") == kept  # nothing is kept outside
    warm = fit(compile_cache=tmp_path / "programs")
    assert tree_digest(plain.state) == tree_digest(cold.state) == tree_digest(warm.state)


@pytest.mark.fresh_compile
@pytest.mark.costs("a second start is a second process")
def test_a_second_start_compiles_nothing(tmp_path):
    script = """
import sys, jax, numpy as np, optax
from sapwood.train import Trainer, supervised
from sapwood.saving.digest import tree_digest
compiled = []
jax.monitoring.register_event_listener(lambda event, **_: compiled.append(event))
model = lambda v, x: x @ v.head.param("kernel", (4, 3), jax.nn.initializers.lecun_normal())
data = {"x": np.eye(4, dtype="float32"), "label": np.arange(4) % 3}
state, _ = Trainer(supervised(model, inputs="x"), optax.adam(0.1)).fit(
    data, steps=6, batch_size=2, progress=False, compile_cache=sys.argv[1])
print(compiled.count("/jax/compilation_cache/cache_hits"), compiled.count("/jax/compilation_cache/cache_misses"))
print(tree_digest(state))
"""

    def start():
        command = [sys.executable, "-c", script, str(tmp_path)]
        counts, digest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return *map(int, counts.split()), digest

    cold, warm = start(), start()
    assert cold[1] > 0
    assert warm[0] >= cold[1]
    assert warm[1] == 0
    assert warm[2] == cold[2]


def programs(directory, **compiled):
    """What a program gives with a cache there, and what JAX said of the cache: hits, and misses."""
    events = []
    listener = lambda event, **_: events.append(event.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        with compile_cache.compile_cache(directory), warnings.catch_warnings():
            warnings.simplefilter("error")  # nor does JAX say that it cannot read one
            result = jax.jit(lambda x: x * 17 + 3)(1.0).item()
    finally:
        jax.monitoring.unregister_event_listener(listener)
    return result, events.count("cache_hits"), events.count("cache_misses")


class Unchecked:
    """Packs without a checksum, as zstandard does, which JAX takes where it is installed."""

    ZstdCompressor = ZstdDecompressor = lambda self: self
    compress = staticmethod(lambda program: b"\x28\xb5\x2f\xfd" + program)
    decompress = staticmethod(lambda packed: packed[4:])


@pytest.mark.fresh_compile
@pytest.mark.parametrize("pack", [None, Unchecked()], ids=["zlib", "zstandard"])
def test_a_damaged_program_is_compiled_anew(tmp_path, monkeypatch, pack):
    """A flipped bit, a cut, nothing, and another program's entry: each is noticed, whatever JAX packs with."""
    monkeypatch.setattr(compilation_cache, "zstandard", pack)
    monkeypatch.setattr(compilation_cache, "zstd", None)
    assert programs(tmp_path) == (20.0, 0, 1)
    (file,) = tmp_path.glob("*-cache")
    whole = file.read_bytes()
    assert whole.startswith(b"\x28\xb5\x2f\xfd") == (pack is not None)
    assert programs(tmp_path) == (20.0, 1, 0)
    with compile_cache.compile_cache(tmp_path / "other"):
        jax.jit(lambda x: x * 17 + 4)(1.0)
    (other,) = (tmp_path / "other").glob("*-cache")
    flips = [bytes([*whole[:i], whole[i] ^ 4, *whole[i + 1 :]]) for i in (0, 9, len(whole) // 2, len(whole) - 60, -1)]
    unsealed = whole[: -len(compile_cache_entries.sealed("", b""))]
    for damaged in (*flips, whole[:-9], whole[: len(whole) // 2], b"", whole + whole, other.read_bytes(), unsealed):
        file.write_bytes(damaged)
        assert programs(tmp_path) == (20.0, 0, 1)
        assert programs(tmp_path) == (20.0, 1, 0)


def test_an_entry_is_one_that_jax_reads_without_its_digest():
    entry = compile_cache_entries.sealed("key", compilation_cache.compress_executable(b"program"))
    assert compilation_cache.decompress_executable(entry) == b"program"
    packed = zlib.compress(b"program")
    assert compile_cache_entries.plain("key", compile_cache_entries.sealed("key", packed)) == packed
    assert compile_cache_entries.plain("other", compile_cache_entries.sealed("key", packed)) is None
    assert compile_cache_entries.plain("key", packed) == packed  # in the tests' own cache, where children write, too
    assert compile_cache_entries.plain("key", packed[:-1]) is None


def test_what_a_killed_process_half_wrote_is_removed(tmp_path):
    for age in (10, 7200):
        part = tmp_path / f"a-cache.{age}-1{compile_cache_entries.PART}"
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age,) * 2)
    with compile_cache.compile_cache(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a-cache.10-1.part"]  # the other may be somebody's


def test_blocks_of_several_threads_put_back_what_was_before_all(tmp_path):
    """The first to begin may end first, and in any other order."""

    def now():
        return [getattr(jax.config, name) for name in SETTINGS], compile_cache_entries.current()

    before = now()
    for order in itertools.permutations(range(3)):
        blocks = [compile_cache.compile_cache(tmp_path / str(i)) for i in range(3)]
        for block in blocks:
            block.__enter__()
        inside = set(range(3))
        for i in order:
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / str(max(inside)))
            blocks[i].__exit__(None, None, None)
            inside.remove(i)
        assert now() == before


def test_the_oldest_make_room(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}-cache").write_bytes(zlib.compress(bytes(100), 0))
        os.utime(tmp_path / f"{i}-cache", (i, i))
    monkeypatch.setattr(compile_cache, "ROOM", 250)
    with compile_cache.compile_cache(tmp_path):
        pass
    assert entries(tmp_path) == ["2-cache", "3-cache"]


@pytest.mark.fresh_compile
def test_the_users_own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path))
    with compile_cache.compile_cache(True) as directory:
        assert directory is not None
        assert directory.parent == tmp_path / "xla"
        assert jax.config.jax_compilation_cache_dir == str(directory)
        with compile_cache.compile_cache(True) as inner:  # there is a directory already
            assert inner is None
        assert jax.config.jax_compilation_cache_dir == str(directory)
    for nothing in (None, False):
        with compile_cache.compile_cache(nothing) as directory:
            assert directory is None


@pytest.mark.fresh_compile
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"compile_cache='.*file': the directory cannot be made"):
        fit(compile_cache=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="a directory, True for the user's own, or None"):
        fit(compile_cache=3)
    monkeypatch.setenv("SAPWOOD_CACHE", str(tmp_path / "file"))
    with compile_cache.compile_cache(True) as directory:  # a home that cannot be written is no reason not to train
        assert directory is None
