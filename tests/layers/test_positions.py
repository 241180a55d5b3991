"""Rotary positions: a rotation of complex numbers that depends on distance alone; and learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


@pytest.mark.parametrize("positions", [None, [5, 0, 2, 100], [[0, 1, 2, 3], [7, 7, 8, 9]]])
def test_is_a_rotation_of_complex_numbers(positions, agree, draw):
    where = jnp.arange(4) if positions is None else jnp.array(positions)

    def oracle(x):
        z = x[..., :3] + 1j * x[..., 3:]
        angles = where.astype(jnp.float32)[..., None, None] * 100.0 ** (-jnp.arange(3) / 3)
        z = z * jnp.exp(1j * angles)
        return jnp.concatenate([z.real, z.imag], -1)

    agree(lambda x: L.Rotary(100.0)({}, x, positions), oracle, draw(2, 4, 3, 6))


def test_products_depend_on_the_distance_alone(draw):
    q, k = draw(1, 1, 1, 16), draw(1, 1, 1, 16)

    def product(i, j):
        return float(jnp.sum(L.rotary(q, jnp.array([i])) * L.rotary(k, jnp.array([j]))))

    assert abs(product(3, 1) - product(503, 501)) < 1e-3
    assert abs(product(3, 1) - product(1, 3)) > 1e-2
    assert abs(product(0, 0) - float(jnp.sum(q * k))) < 1e-5


def test_attention_does_not_change_when_all_positions_shift(draw, weights):
    layer, x = L.MultiHeadAttention(2, causal=True, rotary=L.Rotary()), draw(2, 5, 8)
    params = weights(layer, x)
    assert params.keys() == {"query", "key", "value", "out"}
    run = jax.jit(lambda positions: layer(params, x, positions=positions))
    here, there = jax.jit(layer)(params, x), run(jnp.arange(5) + 40)
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-5)
    shuffled = run(jnp.array([4, 2, 0, 1, 3]))
    assert not np.allclose(here, shuffled, atol=1e-3)


def test_rotary_angles_are_float32_in_low_precision():
    x = jnp.ones((1, 1, 1, 8), "bfloat16")
    low = L.rotary(x, jnp.array([1001]))  # 1001 is 1000 in bfloat16
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, L.rotary(x.astype("float32"), jnp.array([1001])).astype("bfloat16"))


def test_learned_positions_add_a_row_for_each_place(agree, draw):
    agree(
        lambda x, t: L.LearnedPositions(5)({"table": t}, x),
        lambda x, t: jnp.stack([x[:, i] + t[i] for i in range(3)], 1),
        draw(2, 3, 4), draw(5, 4),
    )  # fmt: skip
    table = sw.spec(L.LearnedPositions(5), jnp.ones((2, 3, 4))).params["table"]
    assert (table.shape, table.axes) == ((5, 4), (None, "embed"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: L.rotary(jnp.ones((1, 2, 1, 3))), r"head_dim must be even, got float32\[1,2,1,3\]"),
        (lambda: L.rotary(jnp.ones((2, 1, 4))), r"\(batch, length, heads, head_dim\)"),
        (lambda: L.rotary(jnp.ones((1, 2, 1, 4)), jnp.arange(3)), r"positions \(length,\) or \(batch, length\)"),
        (lambda: L.Rotary(base=1), r"base must be a number above 1, got 1"),
        (lambda: L.LearnedPositions(0), r"max_length must be an integer above 0"),
        (lambda: L.LearnedPositions(2)({}, jnp.ones((1, 3, 4))), r"max_length=2, got length 3"),
        (lambda: L.LearnedPositions(2)({}, jnp.ones((1, 2))), r"\(batch, length, features\)"),
    ],
)
def test_explains_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
