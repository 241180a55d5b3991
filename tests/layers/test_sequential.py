"""Sequential: scopes, plain functions, errors that say which entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


def test_scopes_are_positions_and_functions_take_none(weights):
    model = L.Sequential([L.Flatten(), L.Dense(4), jax.nn.relu, L.Dense(2, bias=False)])
    x = np.ones((3, 2, 2), "float32")
    params = weights(model, x)
    assert {k: set(p) for k, p in params.items()} == {"1": {"kernel", "bias"}, "3": {"kernel"}}
    y = jax.jit(lambda params, x: sw.apply(model, params, {}, x)[0])(params, x)
    params = jax.device_get(params)
    by_hand = np.maximum(x.reshape(3, 4) @ params["1"]["kernel"] + params["1"]["bias"], 0) @ params["3"]["kernel"]
    np.testing.assert_allclose(y, by_hand, rtol=1e-5, atol=1e-6)


def test_names_from_a_dict_keep_their_order():
    model = L.Sequential({"wide": L.Dense(4), "act": jnp.tanh, "a": L.Dense(2)})
    params = sw.spec(model, jnp.ones((1, 3))).params
    assert params["wide"]["kernel"].shape == (3, 4)
    assert params["a"]["kernel"].shape == (4, 2)
    assert model == L.Sequential({"wide": L.Dense(4), "act": jnp.tanh, "a": L.Dense(2)})
    assert hash(model) == hash(L.Sequential({"wide": L.Dense(4), "act": jnp.tanh, "a": L.Dense(2)}))


def test_nests_and_threads_state_and_training(draw, weights):
    block = L.Sequential([L.Dense(4), L.BatchNorm(), L.Dropout(0.5)])
    model = L.Sequential([block, block])
    x = draw(8, 4)
    params = weights(model, x)
    state = jax.tree.map(lambda p: np.ones(p.shape, "float32"), sw.spec(model, x).state)
    run = jax.jit(lambda params, state, x: sw.apply(model, params, state, x, rng=1, train=True))
    y, after = jax.device_get(run(params, state, x))
    assert after.keys() == {"0", "1"}
    assert not np.allclose(after["0"]["1"]["mean"], after["1"]["1"]["mean"])
    assert 0.3 < float((y == 0).mean()) < 0.7


def test_a_function_of_a_cursor_is_made_a_layer():
    @sw.layer
    def shift(v, x):
        return x + v.param("bias", (x.shape[-1],), jax.nn.initializers.ones)

    model = L.Sequential([shift, jnp.exp])
    x = np.zeros(2, "float32")
    params, _ = sw.init(model, 0, x)
    np.testing.assert_allclose(jax.jit(model)(params, x), np.e, rtol=1e-6)


def test_the_first_entry_takes_all_inputs():
    assert float(L.Sequential([jnp.add, jnp.negative])({}, 1.0, 2.0)) == -3


def test_an_error_names_the_entry():
    def broken(x):
        raise ValueError("no")

    model = L.Sequential([L.Dense(2), broken])
    with pytest.raises(ValueError, match="no") as caught:
        sw.spec(model, jnp.ones((1, 3)))
    assert "in '1' of Sequential: broken" in caught.value.__notes__
    with pytest.raises(ValueError, match="rank 2") as caught:
        sw.spec(L.Sequential([L.Dense(2), L.Conv(3, (3, 3))]), jnp.ones((1, 3)))
    assert any(note.startswith("in 1: Conv(") for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([L.Flatten], r"'0' must be a layer or a function of arrays, got .*; write Flatten\(\)"),
        ([L.Dense(2), 3], r"'1' must be a layer or a function of arrays, got 3"),
        ({"head": None}, r"'head' must be a layer"),
        (L.Dense(2), r"layers must be a list, or a dict of named layers, got Dense"),
    ],
)
def test_refuses_what_cannot_be_called(layers, message):
    with pytest.raises(sw.ConfigError, match=message):
        L.Sequential(layers)
