"""What the tests of the kernel share: programs so small that optimising them costs more than running them."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
