"""Data-dependent initialisation: ActNorm starts where its first batch has mean 0 and deviation 1 (arXiv:1807.03039)."""

import jax
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


@sw.layer
def act_norm(v, x):
    features = (x.shape[-1],)
    shift = v.param("shift", features, lambda key, shape, dtype: -x.mean(0))
    scale = v.param("scale", features, lambda key, shape, dtype: 1 / x.std(0))
    return (x + shift) * scale


def model(v, x):
    x = act_norm(v.norms[0], L.Dense(4)(v.first, x))
    return act_norm(v.norms[1], L.Dense(3)(v.second, jax.nn.relu(x)))


X = 5 + 3 * np.random.default_rng(0).normal(size=(32, 4)).astype("float32")


def test_the_first_batch_comes_out_normalised():
    params, _ = sw.init(model, 0, X, data=True)
    y, _ = apply(model, params, {}, X)
    assert np.allclose(y.mean(0), 0, atol=1e-5)
    assert np.allclose(y.std(0), 1, atol=1e-4)


def test_what_does_not_read_data_starts_as_ever():
    plain, _ = sw.init(lambda v, x: L.Dense(4)(v.first, x), 0, X)
    params, _ = sw.init(model, 0, X, data=True)
    assert np.array_equal(params["first"]["kernel"], plain["first"]["kernel"])


def test_it_has_to_be_asked_for():
    message = r"initialisers of norms/0/scale, norms/0/shift, .* read the model's input; use sw.init\(..., data=True\)"
    with pytest.raises(sw.DeclarationError, match=message):
        sw.init(model, 0, X)


def test_it_cannot_run_inside_a_transform():
    def inside(v, x):
        return jax.vmap(lambda row: act_norm(v.norm, row[None]))(x)

    with pytest.raises(sw.EffectError, match="norm: the data-dependent initialiser of 'shift' cannot work: it belongs"):
        sw.init(inside, 0, X, data=True)


if __name__ == "__main__":
    params, _ = sw.init(model, 0, X, data=True)
    y, _ = apply(model, params, {}, X)
    print("mean", y.mean(0), "deviation", y.std(0))
