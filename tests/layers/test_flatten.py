"""Flatten."""

import jax
import numpy as np
import pytest
from jax import export

from sapwood import layers as L


@pytest.mark.parametrize(
    ("shape", "flat"), [((2, 3, 4), (2, 12)), ((5,), (5, 1)), ((0, 3, 4), (0, 12)), ((2, 7), (2, 7))]
)
def test_keeps_the_batch_and_the_order(shape, flat):
    x = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    np.testing.assert_array_equal(jax.jit(L.Flatten())({}, x), x.reshape(flat))


def test_a_symbolic_batch_is_fine():
    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(L.flatten))(jax.ShapeDtypeStruct((batch, 3, 4), "float32"))
    assert exported.out_avals[0].shape == (batch, 12)


def test_refuses_a_scalar():
    with pytest.raises(ValueError, match=r"flatten expects \(batch, \.\.\.\), got float32\[\] of rank 0"):
        L.flatten(1.0)
