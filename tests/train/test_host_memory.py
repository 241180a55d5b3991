"""Memory that a step frees is taken again by the next one: counted as page faults, in processes of their own."""

import os
import subprocess
import sys

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


def test_other_platforms_are_left_alone(monkeypatch):
    from sapwood.train import host_memory

    monkeypatch.setattr(host_memory, "platform", lambda: "gpu")
    assert not host_memory.keep()
