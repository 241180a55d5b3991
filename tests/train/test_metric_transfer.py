"""Packed metrics come back bit for bit, whatever their dtypes and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sapwood.metrics import Confusion, Mean
from sapwood.train.loop.metric_transfer import join, pack, unpack
from sapwood.train.step.checks import Flags

RNG = np.random.default_rng(0)
TREE = {
    "nan": np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], "uint32").view("float32"),  # a NaN's own bits, -inf, -0
    "mean": Mean(np.float32(1.5), np.float32(3)),
    "counts": Confusion(RNG.integers(0, 9, (3, 3)).astype("int32")),
    "flags": Flags({"a": np.bool_(True), "b": np.array([True, False])}),
    "word": np.array([[2**32 - 1]], "uint32"),
    "half": jnp.asarray(RNG.normal(size=(2, 2)), "bfloat16"),
    "small": np.array([-3, 3], "int8"),
    "nothing": np.zeros((0, 2), "float32"),
}


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(map(np.asarray, jax.tree.leaves(one)), map(np.asarray, jax.tree.leaves(other)), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_there_and_back():
    packed = jax.jit(pack)(TREE)
    assert {name: x.shape for name, x in packed.vectors.items()} == {
        "bfloat16": (4,),
        "int8": (2,),
        "uint32": (4 + 2 + 9 + 3 + 1,),
    }
    assert_same(unpack(packed), TREE)


@pytest.mark.parametrize("sizes", [(1, 1), (3,), (1, 2, 1, 3)])
def test_steps_and_blocks_are_joined_in_order(sizes):
    def numbers(i):
        return {"x": i * jnp.float32(0.1), "ok": i % 2 == 0, "pair": jnp.stack([i, i + 1])}

    def block(begin, size):
        if size == 1:
            return pack(numbers(jnp.int32(begin)))
        return lax.scan(lambda i, _: (i + 1, pack(numbers(i))), jnp.int32(begin), None, size)[1]

    parts = [block(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    expected = [numbers(jnp.int32(i)) for i in range(sum(sizes))]
    assert_same(unpack(join(parts)), jax.tree.map(lambda *leaves: np.stack(leaves), *expected))
