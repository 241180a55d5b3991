"""Bound methods as models: an autoencoder whose halves are used together and alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0)


class Autoencoder(sw.Layer):
    """`(batch, features)` to the same, through ``code`` numbers."""

    code: int

    def __call__(self, v, x):
        return self.decode(v, self.encode(v, x), x.shape[-1])

    def encode(self, v, x):
        return jnp.tanh(L.Dense(self.code)(v.encoder, x))

    def decode(self, v, code, features):
        return L.Dense(features)(v.decoder, code)


MODEL, X = Autoencoder(2), np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


@functools.cache
def weights():
    return sw.init(MODEL, 0, X)


def test_the_halves_make_the_whole():
    params, _ = weights()
    code, _ = apply(MODEL.encode, {"encoder": params["encoder"]}, {}, X)
    half, _ = sw.apply(MODEL.decode, {"decoder": params["decoder"]}, {}, code, 4)  # a number is passed on as it is
    assert code.shape == (8, 2)
    assert np.array_equal(half, apply(MODEL, params, {}, X)[0])


def test_spec_and_layer_take_methods():
    assert list(sw.spec(MODEL.decode, np.ones((1, 2), "float32"), 4).params) == ["decoder"]
    assert repr(sw.layer(MODEL.encode)) == "encode"
    assert Autoencoder(code=2) == MODEL
    assert repr(MODEL) == "Autoencoder(code=2)"


def test_a_half_does_not_take_the_whole_tree():
    with pytest.raises(sw.DeclarationError, match="'encode' declares no params decoder/bias, params decoder/kernel"):
        sw.apply(MODEL.encode, weights()[0], {}, X)


def test_a_layer_holds_no_cursor_and_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign to field 'code'"):
        MODEL.code = 3  # pyright: ignore
    with pytest.raises(TypeError, match=r"Autoencoder\(code=2\) takes its variables first.* got ndarray\[8, 4\]"):
        MODEL(X, X)


if __name__ == "__main__":
    params, _ = weights()
    print("code of the first row", sw.apply(MODEL.encode, {"encoder": params["encoder"]}, {}, X)[0][0])
