"""What a model hands back is arrays; of a `yield`, an `async def` or a missing `return` an error says what to write."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.errors import SapwoodError
from sapwood.train.step.forward import forward

BATCH = {"x": np.ones((4, 6), "float32"), "label": np.array([0, 1, 2, 0])}


def yields(v, x):
    yield L.Dense(3)(v.a, x)


async def awaits(v, x):
    return L.Dense(3)(v.a, x)


async def both(v, x):
    yield L.Dense(3)(v.a, x)


def forgets(v, x):
    L.Dense(3)(v.a, x)


def maps(v, x):
    return map(L.Dense(3), [v.a], [x])


def leaves_out(v, x):
    return {"logits": L.Dense(3), "x": x}


def says(v, x):
    return "three", x


def inner(f):
    return lambda v, x: L.Dense(2)(v.b, sw.layer(f)(v.c, x))


LAZY = {
    yields: r"yields returned a generator, since it has a `yield`: nothing was computed\. Write `return`, and",
    awaits: r"awaits is an `async def`: nothing was computed\. Write `def`, and no `await`",
    both: r"both is an `async def`: nothing was computed",
    maps: r"maps returned a map: nothing was computed\. Write tuple\(map\(\.\.\.\)\)",
}
NO_ARRAY = {
    leaves_out: r"leaves_out returned Dense\(features=3\) itself, which is to be called; a model returns arrays",
    says: r"says returned a str \('three'\); a model returns arrays, or dicts and tuples of them",
}


@pytest.mark.parametrize("model", LAZY | NO_ARRAY)
def test_a_model_that_returns_no_arrays(model):
    message = (LAZY | NO_ARRAY)[model]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: never awaited
        for run in (lambda: sw.spec(model, BATCH["x"]), lambda: sw.spec(sw.supervised(model, inputs="x"), BATCH)):
            with pytest.raises(SapwoodError, match=message):
                run()
        if model in LAZY:
            with pytest.raises(SapwoodError, match=message):
                sw.apply(model, {}, {}, BATCH["x"])
            with pytest.raises(SapwoodError, match=message) as caught:
                sw.spec(inner(model), BATCH["x"])
            assert any(note.startswith("in c: ") for note in caught.value.__notes__)


def test_a_model_that_returns_nothing():
    with pytest.raises(SapwoodError, match="forgets returned None; does it `return` what it computes"):
        sw.spec(sw.supervised(forgets, inputs="x"), BATCH)
    in_a_row = [L.Sequential([lambda x: None, layer]) for layer in (L.Dense(2), L.Flatten())]
    for model in (inner(forgets), *in_a_row):
        with pytest.raises(SapwoodError, match="expects an array, got None; does what comes before it `return` its"):
            sw.spec(model, BATCH["x"])
    assert sw.apply(lambda v, x: None, {}, {}, BATCH["x"]) == (None, {})  # a run for its effects


def good(v, x):
    return L.Dense(3)(v.a, x)


OBJECTIVES = [
    (lambda v, b: (None, {}), "returned a loss of type NoneType; a number is expected"),
    (lambda v, b: (jnp.int32(good(v, b["x"]).sum()), {}), "returned a loss of int32, which has no gradient"),
    (sw.supervised(good, lambda o, t: None, inputs="x"), "the loss <lambda> returned None; one loss per example"),
    (sw.supervised(lambda v, x: {"y": good(v, x)}, inputs="x"), r"returned a dict of float32\[4,3\]; the loss softmax"),
    (sw.supervised(lambda v, x: (good(v, x),), inputs="x"), r"returned a tuple of float32\[4,3\]; the loss softmax"),
]


@pytest.mark.parametrize(("objective", "message"), OBJECTIVES, ids=range(len(OBJECTIVES)))
def test_an_objective_that_returns_no_loss(objective, message):
    trainer = sw.Trainer(objective, optax.sgd(0.1))
    params = {"a": {"kernel": np.ones((6, 3), "float32"), "bias": np.ones(3, "float32")}}
    with pytest.raises(SapwoodError, match=message):
        jax.eval_shape(lambda p: forward(trainer, p, {}, None, BATCH, train=True), params)
