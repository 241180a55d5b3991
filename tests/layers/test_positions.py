"""Rotary positions: a rotation of complex numbers that depends on distance alone; and learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


@pytest.mark.parametrize("positions", [None, [5, 0, 2, 100], [[0, 1, 2, 3], [7, 7, 8, 9]]])
def test_is_a_rotation_of_complex_numbers(positions, agree, draw):
    where = np.arange(4) if positions is None else np.array(positions)

    def oracle(x):
        z = x[..., :3] + 1j * x[..., 3:]
        angles = where.astype("float32")[..., None, None] * np.float32(100.0 ** (-np.arange(3) / 3))
        z = z * jnp.exp(1j * angles)
        return jnp.concatenate([z.real, z.imag], -1)

    agree(lambda x: L.Rotary(100.0)({}, x, positions), oracle, draw(2, 4, 3, 6))


def test_products_depend_on_the_distance_alone(draw):
    q, k = (np.asarray(draw(1, 1, 1, 16)) for _ in range(2))
    run = jax.jit(lambda i, j: jnp.sum(L.rotary(q, i) * L.rotary(k, j)))

    def product(i, j):
        return float(run(np.array([i]), np.array([j])))

    assert abs(product(3, 1) - product(503, 501)) < 1e-3
    assert abs(product(3, 1) - product(1, 3)) > 1e-2
    assert abs(product(0, 0) - float(np.sum(q * k))) < 1e-5


def test_attention_does_not_change_when_all_positions_shift(draw, weights):
    layer, x = L.MultiHeadAttention(2, causal=True, rotary=L.Rotary()), draw(2, 5, 8)
    params = weights(layer, x)
    assert params.keys() == {"query", "key", "value", "out"}

    @jax.jit
    def run(params, x, *some):
        return layer(params, x), *(layer(params, x, positions=positions) for positions in some)

    here, there, shuffled = jax.device_get(run(params, x, np.arange(5) + 40, np.array([4, 2, 0, 1, 3])))
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-5)
    assert not np.allclose(here, shuffled, atol=1e-3)


def test_rotary_angles_are_float32_in_low_precision():
    x = np.ones((1, 1, 1, 8), "float32")
    run = jax.jit(lambda x, at: (L.rotary(x.astype("bfloat16"), at), L.rotary(x, at).astype("bfloat16")))
    low, right = jax.device_get(run(x, np.array([1001])))  # 1001 is 1000 in bfloat16
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, right)


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
