"""Vmap: copies side by side with variables, state and keys of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


@pytest.mark.parametrize("in_axes", [0, None, 1])
def test_matches_a_python_loop(in_axes, agree, draw):
    x = draw(*{0: (3, 5, 4), None: (5, 4), 1: (5, 3, 4)}[in_axes])

    def loop(x, kernel):
        rows = [x if in_axes is None else jnp.take(x, i, in_axes) for i in range(3)]
        return jnp.stack([row @ kernel[i] for i, row in enumerate(rows)])

    model = L.Vmap(L.Dense(2, bias=False), 3, in_axes=in_axes)
    agree(lambda x, k: model({"kernel": k}, x), loop, x, draw(3, 4, 2))


def test_several_inputs_have_an_axis_each():
    model = L.Vmap(sw.layer(lambda v, x, y: x + y), 3, in_axes=(0, None))
    x = np.arange(3, dtype="float32")
    np.testing.assert_array_equal(jax.jit(lambda x, y: model({}, x, y))(x, np.float32(10)), [10, 11, 12])
    with pytest.raises(sw.ConfigError, match="speaks for 2 inputs, the call has 1"):
        model({}, x)


def test_declares_stacked_parameters_and_starts_as_a_loop_does():
    x, dense = np.ones((5, 4), "float32"), L.Dense(2, axes=("embed", "mlp"))
    kernel = sw.spec(L.Vmap(dense, 3, in_axes=None), x).params["kernel"]
    assert (kernel.shape, kernel.axes) == ((3, 4, 2), ("expert", "embed", "mlp"))
    assert sw.spec(L.Vmap(dense, 3, axis=None, in_axes=None), x).params["kernel"].axes == (None, "embed", "mlp")
    params, _ = sw.init(L.Vmap(dense, 3, in_axes=None), 0, x)
    plain, _ = jax.device_get(sw.init(lambda v, x: [dense(v[i], x) for i in range(3)], 0, x))
    jax.tree.map(np.testing.assert_array_equal, params, sw.stack(plain))


def test_state_and_masks_are_each_copys_own(draw):
    model = L.Vmap(L.Sequential([L.BatchNorm(scale=False, bias=False), L.Dropout(0.5)]), 3, in_axes=0)
    x = np.asarray(draw(3, 16, 4)) + np.arange(3, dtype="float32")[:, None, None]
    state = {"0": {"mean": np.zeros((3, 4), "float32"), "var": np.ones((3, 4), "float32")}}
    run = jax.jit(lambda state, x: sw.apply(model, {}, state, x, rng=0, train=True))
    y, after = jax.device_get(run(state, x))
    np.testing.assert_allclose(after["0"]["mean"], 0.1 * x.mean(1), rtol=1e-4, atol=1e-6)
    masks = {(row == 0).tobytes() for row in y}
    assert len(masks) == 3


def test_refuses_bad_options():
    with pytest.raises(sw.ConfigError, match="n must be an integer above 0, got 0"):
        L.Vmap(L.Dense(2), 0)
