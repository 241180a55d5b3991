"""What a trainer keeps from one call to the next: all while its code is the same, nothing that was edited since."""

import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L

HERE = sys.modules[__name__]
TRACED = itertools.count()
SCALE = 1.0
WIDTH = 2
X = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
DATA = {"features": X[:8], "label": np.arange(8) % 2}


def helper(x):
    return x * SCALE


def body(x, _):
    return helper(x), None


NOTED = []


def model(v, x):
    next(TRACED)
    NOTED.append(v.train)  # what tracing changes is no edit
    x, _ = jax.lax.scan(body, x, None, length=2)  # JAX keeps the body by itself
    return L.Dense(WIDTH)(v.head, helper(x))


def traces():
    return int(repr(TRACED)[len("count(") : -1])


def outputs(state, x=X[:8]):
    """The same model in NumPy, float64."""
    head = {name: np.asarray(value, np.float64) for name, value in state.params["head"].items()}
    return (x * np.float64(SCALE) ** 3) @ head["kernel"] + head["bias"]


def loss(state):
    logits = outputs(state)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(8), DATA["label"]])


@pytest.fixture
def compiled():
    """What JAX traces and compiles, as its events say."""
    events = []
    listen = lambda event, *_, **__: events.append(event) if "compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def run(train, **options):
    """A step on all examples, with validation, and every program once more by itself."""
    state, history = train.fit(DATA, epochs=1, batch_size=8, validation=DATA, progress=False, **options)
    row = history[-1]
    return state, row["loss"], row["validation_loss"], train.evaluate(state, DATA)["loss"], train.predict(state, DATA)


@pytest.mark.costs("the programs of a trainer, compiled before and after an edit")
def test_all_is_kept_while_the_code_is_the_same_and_made_anew_where_it_was_edited(monkeypatch, compiled):
    train = sw.Trainer(sw.supervised(model, inputs="features"), optax.sgd(0.0))
    state, *first = run(train)
    before = traces()
    begin = state.replace(step=jnp.int32(0))
    assert compiled
    compiled.clear()
    *_, again = run(train), run(train, seed=7), run(train, state=begin)
    assert traces() == before
    assert not [event for event in compiled if "backend" in event]
    assert again[1:-1] == tuple(first[:-1])
    np.testing.assert_array_equal(again[-1], first[-1])

    monkeypatch.setattr(HERE, "SCALE", 3.0)
    edited, *found, predicted = run(train)
    np.testing.assert_allclose(found, loss(edited), rtol=1e-4)
    np.testing.assert_allclose(predicted, outputs(edited), rtol=1e-4, atol=1e-5)
    assert abs(found[0] - first[0]) > 0.1
    monkeypatch.setattr(HERE, "WIDTH", 5)
    assert jax.eval_shape(lambda: train.init(0, DATA)).params["head"]["kernel"].shape == (3, 5)


def logged(v, x):
    jax.debug.callback(lambda mean: NOTED.append(mean), x.mean())
    return x * LARGE[0]


LARGE = np.broadcast_to(np.float32(1), 100_000_000)  # which takes no memory


def test_what_a_callback_fills_is_no_edit_and_a_large_array_costs_nothing():
    train = sw.Trainer(sw.supervised(logged), optax.sgd(0.0))
    programs = train.compiled
    NOTED.append(0.0)
    begun = time.perf_counter()
    assert train.compiled is programs
    assert time.perf_counter() - begun < 0.2  # all its numbers take 0.4 s


def test_another_place_is_another_program():
    programs, double = sw.Trainer(sw.supervised(model), optax.sgd(0.0)).compiled, jax.jit(lambda x: 2 * x)
    for device in jax.devices()[:2]:
        x = jax.device_put(X, device)
        program, _ = programs.compile(double, x)
        assert program(x).devices() == {device}
        assert programs.compile(double, x)[0] is program


def test_predictions_of_twenty_sizes_are_of_three_programs():
    train = sw.Trainer(sw.supervised(model, inputs="features"), optax.sgd(0.0))
    state = train.init(0, DATA)
    before = traces()
    for n in range(1, 21):
        found = train.predict(state, {"features": X[:n]})
        np.testing.assert_allclose(found, outputs(state, X[:n]), rtol=1e-5, atol=1e-6)
    assert traces() == before + 3


def test_a_mesh_that_was_used_is_the_same_mesh():
    train = sw.Trainer(sw.supervised(model, inputs="features"), optax.sgd(0.0), mesh="data=8")
    programs = train.compiled
    jax.eval_shape(lambda: train.init(0, DATA))
    assert train.put(DATA)["features"].sharding.mesh.size == train.mesh.size == 8
    assert train.compiled is programs
