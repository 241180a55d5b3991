"""Memory that a step frees is taken again by the next one: counted as page faults, in processes of their own."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sapwood.runtime import compile_options, malloc

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of the GNU C library")

SCRIPT = """
import json, resource, statistics
import jax, jax.numpy as jnp, sapwood
from sapwood.runtime import compile_options, malloc

WIDTH = 8

def traced(x, layers):
    def function(x):
        for i in range(1, layers + 1):
            x = jnp.tanh(x * i) @ jnp.full((WIDTH, WIDTH), 1e-2, x.dtype)
        return x.sum()
    return jax.jit(jax.grad(function)).trace(x)

def faults(step, x):
    found = []
    for i in range(12):  # each of XLA's threads takes pages once, whenever its first step comes
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step(x).block_until_ready()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return [statistics.median(found[6:]), step.memory_analysis().temp_size_in_bytes]

for rows, dtype in ((2**21, "float32"), (5 * 2**19, "bfloat16")):  # a value fills a heap, of bfloat16 where it is wide
    x = jnp.ones((rows, WIDTH), dtype)
    compile_options.compiled(traced(x, 2), "cpu")(x).block_until_ready()
x, memory = jnp.ones((2**17, WIDTH)), malloc._memory
program, measured = traced(x, 36), {}
measured["leave"] = faults(program.lower().compile(), x)
malloc._memory = lambda: 2**28
measured["small"] = faults(compile_options.compiled(traced(x, 12), "cpu"), x)
malloc._memory = memory
measured["keep"] = faults(compile_options.compiled(program, "cpu"), x)  # for the rest of the process: this is the last
print(json.dumps(measured))
"""


@pytest.fixture(scope="module")
def measured():
    """The median page faults of a step, and the bytes of its temporaries, however its memory is treated; and what the
    process has said. One process is asked for all, because most of its time is its start."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@linux
@pytest.mark.slow
@pytest.mark.fresh_compile
def test_steps_after_the_first_take_no_fresh_pages(measured):
    faults, bytes_ = measured[0]["keep"]
    more, whole = measured[0]["leave"]
    assert more * 4096 > 0.5 * whole > malloc.HEAP  # malloc gives back all of it, every time
    assert faults < 0.05 * more
    assert bytes_ < 1.02 * whole


@linux
@pytest.mark.slow
@pytest.mark.fresh_compile
def test_no_program_keeps_more_than_its_share_of_the_memory(measured):
    faults, _ = measured[0]["small"]
    assert faults > 1000  # what malloc's own default gives back


@pytest.mark.slow
@pytest.mark.fresh_compile
def test_a_value_that_no_heap_holds_is_left_to_the_kernel_without_a_word_from_xla(measured):
    assert measured[1] == ""


def test_a_malloc_that_is_set_up_already_is_left_alone(monkeypatch):
    traced = jax.jit(lambda x: x + 1).trace(jnp.ones(3))
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "2")
            assert malloc._mallopt() is None
            assert not malloc.fits(0)
            assert compile_options.compiled(traced, "cpu")(jnp.ones(3)).tolist() == [2, 2, 2]


def test_where_there_is_no_mallopt_nothing_else_is_asked(monkeypatch):
    """macOS and Windows have no `os.sched_getaffinity` either."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert not malloc.fits(2**27)
    assert not malloc.keep(2**27)
