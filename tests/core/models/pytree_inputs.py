"""Inputs and outputs of any structure: dicts, named tuples, None, and what is no array at all."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


class Pair(NamedTuple):
    mean: jax.Array
    scale: jax.Array


def model(v, batch, mode="mean"):
    x = L.Dense(8)(v.image, batch["image"])
    if batch.get("label") is not None:
        x = x + L.Embed(3, 8)(v.label, batch["label"])
    pair = Pair(L.Dense(2)(v.mean, x), jax.nn.softplus(L.Dense(2)(v.scale, x)))
    return {"pair": pair, "chosen": pair.mean if mode == "mean" else pair.scale}


BATCH = {
    "image": np.random.default_rng(0).normal(size=(4, 5)).astype("float32"),
    "label": np.array([0, 1, 2, 0], "int32"),
}


@functools.cache
def weights():
    return sw.init(model, 0, BATCH)[0]


def test_structures_go_in_and_come_out():
    out, _ = jax.jit(lambda p, b: sw.apply(model, p, {}, b))(weights(), BATCH)
    assert isinstance(out["pair"], Pair)
    assert np.array_equal(out["chosen"], out["pair"].mean)


def test_spec_takes_shapes_and_passes_on_what_is_no_array():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), BATCH)
    spec = sw.spec(model, shapes, "scale")
    assert jax.tree.map(lambda p: p.shape, spec.params) == jax.tree.map(jnp.shape, weights())
    out, _ = jax.jit(lambda p, b: sw.apply(model, p, {}, b, "scale"))(weights(), BATCH)
    assert np.array_equal(out["chosen"], out["pair"].scale)
    assert sw.init(model, 0, shapes, "scale")[0]["image"]["kernel"].shape == (5, 8)


def test_an_input_left_out_leaves_parameters_over():
    with pytest.raises(sw.DeclarationError, match="'model' declares no params label/table"):
        sw.apply(model, weights(), {}, {"image": BATCH["image"], "label": None})


def test_an_input_that_does_not_fit_names_the_layer():
    with pytest.raises(sw.DeclarationError, match=r"params image/kernel: the model declares shape \(6, 8\)") as caught:
        sw.apply(model, weights(), {}, {**BATCH, "image": np.ones((4, 6), "float32")})
    assert "in image: Dense(features=8) on float32[4,6]" in caught.value.__notes__
    with pytest.raises(sw.InputError, match=r"Embed expects integers, got float32\[4\]"):
        sw.spec(model, {**BATCH, "label": np.ones(4, "float32")})


if __name__ == "__main__":
    print(jax.tree.map(jnp.shape, sw.apply(model, weights(), {}, BATCH)[0]))
