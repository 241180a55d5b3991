"""Memory that a step frees is taken again by the next one: counted as page faults, in processes of their own."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sapwood.train import compiling, host_memory

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")

SCRIPT = """
import json, resource, statistics, sys
import jax, jax.numpy as jnp, sapwood
from sapwood.train import compiling, host_memory
rows, layers = int(sys.argv[2]), int(sys.argv[3])
x = jnp.ones((rows, 64), sys.argv[4])

def function(x):
    for i in range(1, layers + 1):
        x = jnp.tanh(x * i) @ jnp.full((64, 64), 1e-3, x.dtype)
    return x

traced = jax.jit(jax.grad(lambda x: function(x).sum())).trace(x)
if sys.argv[1] == "small":
    host_memory._memory = lambda: 2**28
step = compiling.compiled(traced, "cpu") if sys.argv[1] != "leave" else traced.lower().compile()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
for i in range(24):  # each of XLA's threads takes pages once, whenever its first step comes
    before = faults()
    step(x).block_until_ready()
    found.append(faults() - before)
print(json.dumps([statistics.median(found[8:]), step.memory_analysis().temp_size_in_bytes]))
"""


def run(mode, rows=2**14, layers=48, dtype="float32"):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode, str(rows), str(layers), dtype],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@linux
def test_steps_after_the_first_take_no_fresh_pages():
    faults, bytes_ = run("keep")
    more, whole = run("leave")
    assert more * 4096 > 0.5 * whole > host_memory.HEAP  # malloc gives back all of it, every time
    assert faults < 0.05 * more
    assert bytes_ < 1.02 * whole


@linux
def test_no_program_keeps_more_than_its_share_of_the_memory():
    faults, _ = run("small")
    assert faults > 1000  # what malloc's own default gives back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_that_no_heap_holds_is_left_to_the_kernel_without_a_word_from_xla(dtype):
    run("keep", rows=5 * 2**16 if dtype == "bfloat16" else 2**18, layers=2, dtype=dtype)


def test_a_malloc_that_is_set_up_already_is_left_alone(monkeypatch):
    traced = jax.jit(lambda x: x + 1).trace(jnp.ones(3))
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "2")
            assert host_memory._mallopt() is None
            assert not host_memory.fits(0)
            assert compiling.compiled(traced, "cpu")(jnp.ones(3)).tolist() == [2, 2, 2]


def test_where_there_is_no_mallopt_nothing_else_is_asked(monkeypatch):
    """macOS and Windows have no `os.sched_getaffinity` either."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert not host_memory.fits(2**27)
    assert not host_memory.keep(2**27)
