"""The cache of compiled programs: what is kept where, what is put back afterwards, and that programs stay the same."""

import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood import ConfigError
from sapwood.train import Trainer, compile_cache, supervised
from sapwood.train.digest import tree_digest

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
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
from sapwood.train.digest import tree_digest
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


def test_what_a_killed_process_half_wrote_is_removed(tmp_path):
    with compile_cache.compile_cache(tmp_path):
        jax.jit(lambda x: x + 17)(1.0)
    whole = entries(tmp_path)
    (tmp_path / "cut-cache").write_bytes(zlib.compress(b"program" * 100)[:20])
    with compile_cache.compile_cache(tmp_path):
        assert entries(tmp_path) == whole


def test_the_oldest_make_room(tmp_path, monkeypatch):
    import os

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
