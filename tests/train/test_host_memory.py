"""Memory that a step frees is taken again by the next one: counted as page faults, in processes of their own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

SCRIPT = """
import resource, sys
import jax, jax.numpy as jnp, sapwood, optax
from sapwood.train import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep()
x = jnp.ones((1024, 1024))
step = jax.jit(lambda x: sum((x * i) @ x for i in range(1, 9)) / 1e6)
for i in range(24):
    x = step(x).block_until_ready()
    if i == 11:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode, **environment):
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}, **environment}
    environment["XLA_FLAGS"] = ""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")
def test_steps_after_the_first_take_no_fresh_pages():
    assert faults("keep") < 0.5 * faults("leave")  # it settles: now and then a piece lands elsewhere


def test_a_malloc_that_is_set_up_already_is_left_alone(monkeypatch):
    from sapwood.train import host_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not host_memory.keep()


@pytest.mark.parametrize(
    ("platforms", "cpu"), [(None, False), ("", False), ("cpu", True), ("cpu,cuda", True), ("tpu,cpu", False)]
)
def test_where_there_is_an_accelerator_the_cpu_has_to_be_asked_for(monkeypatch, tmp_path, platforms, cpu):
    from sapwood.train import host_memory

    (tmp_path / "accel0").touch()
    monkeypatch.setattr(host_memory, "ACCELERATORS", [f"{tmp_path}/accel*"])
    monkeypatch.setattr(host_memory, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms)))
    assert host_memory.on_cpu() == cpu
    assert cpu or not host_memory.keep()


def test_what_it_asks_starts_no_backend():
    code = "from sapwood.train import host_memory; host_memory.keep()\n"
    code += "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
