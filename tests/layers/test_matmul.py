"""`matmul` against `numpy.tensordot`, and the form it has on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapwood.layers.linear.matmul import matmul


@pytest.mark.parametrize(
    ("x", "kernel", "dims"),
    [
        ((5, 4), (4, 3), 1),
        ((2, 3, 4), (4, 5), 1),
        ((2, 3, 4), (4, 5, 6), 1),
        ((2, 3, 5, 6), (5, 6, 4), 2),
        ((4,), (4, 3), 1),
        ((0, 3, 4), (4, 5), 1),
        ((2, 3, 0), (0, 5), 1),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_matches_tensordot(x, kernel, dims, split, sample):
    x, kernel = sample(*x), sample(*kernel)
    expected = np.tensordot(x.astype(float), kernel.astype(float), dims)
    got = jax.jit(lambda x, kernel: matmul(x, kernel, dims, split=split))(x, kernel)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def gradient_of_the_kernel(split):
    x, kernel, dy = (np.ones(shape, "float32") for shape in ((2, 16, 8), (8, 4), (2, 16, 4)))
    return jax.jit(jax.grad(lambda w: (matmul(jnp.sin(x), w, split=split) * dy).sum())).lower(kernel)


def test_on_a_cpu_the_kernels_gradient_contracts_one_dimension():
    """Two contracted dimensions are what makes XLA transpose: the reason for this file."""
    assert "contracting_dims = [0] x [0]" in gradient_of_the_kernel(split=False).as_text()
    assert "contracting_dims = [0, 1] x [0, 1]" in gradient_of_the_kernel(split=True).as_text()
