"""The gate of speed: the step of a recipe lowers to the operations of the same step written by hand, one for one."""

import functools
import importlib.util
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood.recipes.vision.digits import Digits
from sapwood.recipes.vision.digits_mlp import DigitsMLP
from sapwood.train.state import plan

_spec = importlib.util.spec_from_file_location("handwritten", Path(__file__).with_name("handwritten.py"))
handwritten = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(handwritten)

BATCH = {"image": np.zeros((32, 8, 8, 1), "uint8"), "label": np.zeros(32, "int32")}
RECIPES = {"digits-mlp": (DigitsMLP(), handwritten.mlp_loss), "digits": (Digits(), handwritten.conv_loss)}


def operations(lowered) -> Counter:
    """How often each StableHLO operation is run, calls of functions followed.

    Barriers compute nothing: they are what `layers.once` adds on a CPU, and are left out.
    """
    functions: dict[str, Counter] = {}
    name = ""
    for line in lowered.as_text().splitlines():
        if found := re.search(r"func\.func \w+ @([\w.]+|\"[^\"]+\")\(", line):
            name = found[1]
            functions[name] = Counter()
        elif found := re.search(r"= (?:\"?((?:stablehlo|chlo)\.\w+)|(?:func\.)?call @([\w.]+|\"[^\"]+\"))", line):
            functions[name][found[1] or "@" + found[2]] += 1

    def total(name: str) -> Counter:
        count: Counter = Counter()
        for operation, times in functions[name].items():
            inner = total(operation[1:]) if operation.startswith("@") else {operation: 1}
            count.update({key: value * times for key, value in inner.items()})
        return count

    count = total("main")
    del count["stablehlo.optimization_barrier"]
    return count


@functools.cache
def ours(recipe, metrics=(), **options) -> Counter:
    """The operations of a step, of states that are only described: nothing is drawn, and nothing compiled."""
    trainer = sw.Trainer(sw.supervised(recipe.model, metrics=metrics), recipe.optimizer(100), **options)
    return operations(jax.jit(trainer.step).lower(plan.plan(trainer, BATCH).shapes, BATCH))


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_is_the_handwritten_one(name):
    recipe, loss = RECIPES[name]
    optimizer = recipe.optimizer(100)
    params, state = jax.tree.map(lambda p: p.struct, tuple(sw.spec(recipe.model, BATCH["image"])))
    opt_state, key = jax.eval_shape(lambda params: (optimizer.init(params), jax.random.key(0)), params)
    whole = params, state, opt_state, key, jax.ShapeDtypeStruct((), "int32")
    floor = jax.jit(lambda state, batch: handwritten.train_step(loss, optimizer, state, batch))
    here, there = ours(recipe, checks=False), operations(floor.lower(whole, BATCH))
    assert here - there == Counter()
    folded = operations(jax.jit(jax.random.fold_in).lower(key, 0))  # which we do with less
    assert there - here <= folded
    assert (there - here).total() < 10


def test_the_count_follows_calls():
    f = jax.jit(lambda x: jnp.sin(x) + 1)
    count = operations(jax.jit(lambda x: f(x) * f(x + 2)).lower(1.0))
    assert (count["stablehlo.sine"], count["stablehlo.multiply"]) == (2, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_what_default_extras_add_is_little(name):
    """Checks and accuracy are on by default; the races of `benchmarks/` have them on, too.

    A check reads the gradient of each parameter: two operations for each, where there is nothing to fuse with.
    """
    recipe, _ = RECIPES[name]
    plain = ours(recipe, checks=False)
    assert (ours(recipe, checks=True) - plain).total() <= 64
    assert (ours(recipe, checks=False, metrics=("accuracy",)) - plain).total() <= 30
