"""JAX's own switches: every layer and every objective takes a tiny step under each of them.

What a switch refuses, it refuses while a program is traced, so most need no compiling. The whole suites under each
switch are `long`: `pytest -m long tests/train/test_switches.py -s` says how many tests pass.
"""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood import losses
from sapwood.core.layer import Layer
from sapwood.models import Decoder
from sapwood.train import next_token

SWITCHES = {
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "leaks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
    "eager": jax.disable_jit,
}
VARIABLES = {
    "dtypes": "JAX_NUMPY_DTYPE_PROMOTION=strict",
    "ranks": "JAX_NUMPY_RANK_PROMOTION=raise",
    "leaks": "JAX_CHECK_TRACER_LEAKS=1",
    "x64": "JAX_ENABLE_X64=1",
    "eager": "JAX_DISABLE_JIT=1",
    "nans": "JAX_DEBUG_NANS=1",
}
IMAGE, SEQUENCE, LONG, IDS = (2, 6, 6, 4), (2, 6, 4), (2, 128, 4), (2, 6)
LAYERS = [
    (L.Dense(3), SEQUENCE),
    (L.Conv(4, (3, 3)), IMAGE),
    (L.BatchNorm(), IMAGE),
    (L.LayerNorm(), SEQUENCE),
    (L.RMSNorm(), SEQUENCE),
    (L.GroupNorm(2), IMAGE),
    (L.Dropout(0.5), SEQUENCE),
    (L.Embed(7, 4), IDS),
    (L.MaxPool((2, 2), padding="SAME"), IMAGE),
    (L.AvgPool((2, 2), padding="SAME"), IMAGE),
    (L.GlobalMaxPool(), IMAGE),
    (L.GlobalAvgPool(), IMAGE),
    (L.Flatten(), IMAGE),
    (L.MultiHeadAttention(2, bias=True), SEQUENCE),
    (L.MultiHeadAttention(2, kv_heads=1, causal=True, rotary=L.Rotary()), LONG),
    (L.MixtureOfExperts(3, 8, capacity=1.0), SEQUENCE),
    (L.Rotary(), IMAGE),
    (L.LearnedPositions(8), SEQUENCE),
    (L.Sequential([L.Dense(4), jax.nn.relu]), SEQUENCE),
    (L.Scan(L.Dense(4), 2), SEQUENCE),
    (L.Remat(L.Dense(4)), SEQUENCE),
    (L.Vmap(L.Dense(3), 2, in_axes=None), SEQUENCE),
]


def inputs(layer, shape):
    """What a layer takes, its mask too."""
    x = jax.ShapeDtypeStruct(shape, "int32" if shape is IDS else "float32")
    mask = jax.ShapeDtypeStruct(shape[:-1], bool)
    return (x, mask) if isinstance(layer, L.BatchNorm | L.GlobalAvgPool | L.MixtureOfExperts) else (x,)


def step(layer, policy, params, state, x, *mask):
    """A loss, and the gradients of the parameters and of x."""

    def loss(params, x):
        v = sw.bind(params, state, rng=0, train=True, policy=policy)
        y, updates = sw.pure(layer)(v, x, *mask)
        return jnp.sum(y.astype(jnp.float32)) + sum(jax.tree.leaves(updates.losses)), (y, updates.state)

    return jax.grad(loss, (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0, has_aux=True)(params, x)


def test_the_table_names_every_layer():
    public = {x for x in map(L.__dict__.get, L.__all__) if isinstance(x, type) and issubclass(x, Layer)}
    assert {type(layer) for layer, _ in LAYERS} == public


def of_layers():
    """The shapes of a step of each, in bfloat16."""
    found = []
    for layer, shape in LAYERS:
        xs = inputs(layer, shape)
        variables = (jax.tree.map(lambda p: p.struct, tree) for tree in sw.spec(layer, *xs))
        found.append(jax.eval_shape(lambda *args, layer=layer: step(layer, "bfloat16", *args), *variables, *xs))
    return found


def of_objectives():
    """The parameters after a step of all of them in one: every loss, and a language model with mixtures."""
    x, tokens = np.ones((4, 3), "float32"), np.zeros((4, 6), "int32")
    batch = {"x": x, "id": np.zeros(4, "int32"), "y": np.full((4, 5), 0.5, "float32"), "weight": x[:, 0]}
    batch |= {"tokens": tokens, "targets": tokens, "of": np.ones((4, 6), "int32"), "mask": np.arange(4) < 3}
    each = {"next_token": next_token(Decoder(7, 2, 8, 2, mlp=8, experts=2, bias=True, dropout=0.1), segments="of")}
    for name in losses.LOSSES:
        target = "id" if name == "softmax_cross_entropy" else "y"
        each[name] = sw.supervised(lambda v, x: L.Dense(5)(v.head, x), name, metrics=(), inputs="x", target=target)

    def objective(v, batch):
        return sum(one(v[name], batch)[0] for name, one in each.items()), {}

    trainer = sw.Trainer(objective, optax.adam(1e-2), policy="bfloat16")
    state = jax.eval_shape(lambda: trainer.init(0, batch))
    return jax.eval_shape(trainer.step, state, batch)[0].params


@pytest.fixture(scope="module")
def described():
    return of_layers(), of_objectives()


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_step_of_every_layer_and_objective(switch, described):
    """Of the same shapes and dtypes: under x64 there are no 64-bit numbers either."""
    with SWITCHES[switch]():
        assert (of_layers(), of_objectives()) == described


DATA = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.arange(8) % 2


def model(v, x):
    return L.Dense(2)(v.out, L.BatchNorm()(v.norm, x))


def run():
    trainer = sw.Trainer(sw.supervised(model, inputs="features"), optax.adam(1e-2))
    state, history = trainer.fit(DATA, epochs=1, batch_size=4, validation=DATA, progress=False)
    return state.params, trainer.evaluate(state, DATA), trainer.predict(state, DATA[0]), history[-1]["loss"]


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.mark.slow
@pytest.mark.parametrize("switch", [*SWITCHES, "nans"])
def test_fit_evaluate_and_predict(switch, plain):
    """With the numbers of a run without the switch."""
    with (SWITCHES | {"nans": lambda: jax.debug_nans(True)})[switch]():
        found = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, plain)


@pytest.mark.slow
def test_without_jit_fit_calls_the_model_with_numbers():
    seen = []

    def model(v, x):
        seen.append(isinstance(x, jax.core.Tracer))
        return L.Dense(2)(v.out, x)

    trainer = sw.Trainer(sw.supervised(model, inputs="features"), optax.sgd(1e-2))
    with jax.disable_jit():
        trainer.fit(DATA, epochs=1, batch_size=8, progress=False)
    assert not all(seen)


@pytest.mark.long
@pytest.mark.parametrize("room", ["core", "layers", "train"])
@pytest.mark.parametrize("switch", VARIABLES)
def test_the_suite_of_a_room(switch, room):
    """Prints how many pass. Tests that fail hold what the switch refuses by itself; the table is read, not asserted."""
    name, value = VARIABLES[switch].split("=")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{room}"],
        env={**os.environ, name: value}, capture_output=True, text=True,
    )  # fmt: skip
    summary = re.findall(r"^.*\d+ passed.*$", done.stdout, re.MULTILINE)
    print(f"\n{VARIABLES[switch]} {room}: {summary[-1] if summary else done.stdout[-500:]}")
    for line in re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE):
        print("   ", line)
    assert summary
