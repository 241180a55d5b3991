"""The one loop: unrolled on CPU where it convolves, compiled once elsewhere, the same numbers in both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sapwood.core import scan, target_platform


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


custom = jax.custom_jvp(convolve)
custom.defjvps(lambda dx, y, x, kernel: dx, None)

BODIES = {
    "plain": lambda x, kernel: (convolve(x, kernel), x.sum()),
    "in a checkpoint": lambda x, kernel: (jax.checkpoint(convolve)(x, kernel), x.sum()),
    "in a branch": lambda x, kernel: (lax.cond(x.sum() > 0, convolve, lambda x, kernel: x, x, kernel), x.sum()),
    "in an inner loop": lambda x, kernel: (lax.fori_loop(0, 2, lambda _, x: convolve(x, kernel), x), x.sum()),
    "in a jit": lambda x, kernel: (jax.jit(convolve)(x, kernel), x.sum()),
    "in a gradient": lambda x, kernel: (jax.grad(lambda x: convolve(x, kernel).sum() ** 2)(x), x.sum()),
    "with a gradient of its own": lambda x, kernel: (custom(x, kernel), x.sum()),
}


@pytest.fixture
def start():
    numbers = np.random.default_rng(0)
    return jnp.asarray(numbers.normal(size=(1, 5, 2)), "f4"), jnp.asarray(numbers.normal(size=(4, 3, 2, 2)), "f4")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_finds_a_convolution_however_deep(body, start):
    assert scan.unrolls(body, *start)


def test_everything_else_stays_a_loop(start):
    x, kernels = start
    assert not scan.unrolls(lambda x, k: (jnp.tanh(x @ k[0]), None), x, kernels)
    assert not scan.unrolls(lambda i, _: (i + 1, None), 0, None, 3)


def test_what_is_unrolled_has_no_loop(start):
    def loops(body):
        return jax.jit(lambda x, k: scan.scan(body, x, k)).lower(*start).as_text().count("stablehlo.while")

    assert loops(BODIES["plain"]) == 0
    assert loops(lambda x, k: (jnp.tanh(x @ k[0]), None)) == 1


def test_other_platforms_keep_the_loop(start, monkeypatch):
    monkeypatch.setattr(scan, "platform", lambda: "tpu")
    assert not scan.unrolls(BODIES["plain"], *start)


def test_a_chosen_default_device_counts():
    assert target_platform.platform() == "cpu"
    with jax.default_device("cpu"):
        assert target_platform.platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert target_platform.platform() == "cpu"


def test_same_bits_as_a_python_loop(start):
    def by_hand(x, kernels):
        sums = []
        for kernel in kernels:
            x, total = BODIES["plain"](x, kernel)
            sums.append(total)
        return x, jnp.stack(sums)

    def run(f):
        y, pull = jax.vjp(f, *start)
        return y, pull(y)

    ours, theirs = (
        jax.jit(lambda: run(lambda x, k: scan.scan(BODIES["plain"], x, k)))(),
        jax.jit(lambda: run(by_hand))(),
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_takes_a_length_as_lax_does():
    y, steps = scan.scan(lambda x, _: (2 * x, x), jnp.ones(()), None, 3)
    assert (float(y), steps.tolist()) == (8.0, [1.0, 2.0, 4.0])


def test_what_is_traced_for_one_platform_is_not_used_for_another():
    inner = jax.jit(lambda x: x + (target_platform.platform() == "tpu"))
    with target_platform.compiling_for("tpu"):
        assert inner(1) == 2
    assert inner(1) == 1
