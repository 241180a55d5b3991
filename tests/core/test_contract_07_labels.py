"""Contract 7: in apply mode a path is a label: equal blocks trace once, collectors go when their run goes."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core import vars as core_vars
from sapwood.core.initializers import ones

X = np.ones((2, 4), "float32")


def block(v, x):
    return L.Dropout(0.5)(v.drop, x * v.param("scale", (4,), ones))


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("outer_jit", [False, True])
def test_twenty_blocks_trace_once(fork, outer_jit):
    traces = []

    @jax.jit
    def jitted(v, x):
        traces.append(v)
        return sw.pure(block)(v, x)[0]

    def model(v, x):
        for i in range(20):
            place = v.blocks[i]
            x = jitted(place.fork() if fork else place, x)
        return x

    def run(params):
        return sw.pure(model)(sw.bind(params, rng=0, train=fork), X)[0]

    params = {"blocks": {str(i): {"scale": jnp.full(4, 1.0 + i)} for i in range(20)}}
    y = (jax.jit(run) if outer_jit else run)(params)
    assert len(traces) == 1
    if not fork:
        np.testing.assert_allclose(y, np.prod(np.arange(1.0, 21)) * X, rtol=1e-4)


def test_a_path_pattern_needs_the_path():
    """Which values are captured depends on the place, so there each place is traced."""
    jitted = jax.jit(sw.pure(lambda v, x: v.sow("x", x)))

    def model(v, x):
        for i in range(3):
            v.blocks[i].merge(jitted(v.blocks[i], x)[1])

    captured = sw.apply(model, {}, {}, X, capture="blocks/1/x")[2]
    assert list(captured["blocks"]) == ["1"]


def test_mode_and_precision_are_no_labels():
    jitted = jax.jit(sw.pure(lambda v, x: v.train))
    for train in (True, False):
        v = sw.bind({}, train=train)
        assert bool(jitted(v, X)[0]) is train
    cast = jax.jit(sw.pure(lambda v, x: v.param("w", (4,), ones)))
    for policy in ("float32", "bfloat16"):
        assert cast(sw.bind({"w": X[0]}, policy=policy), X)[0].dtype == policy


def train_step(params, state, key):
    def model(v, x):
        x = L.Scan(L.Remat(sw.layer(block)), 2, remat="nothing_saveable")(v.blocks, x)
        x = L.BatchNorm()(v.norm, x)
        v.loss("size", jnp.mean(x**2))
        v.sow("x", x)
        v.check(jnp.isfinite(x), "finite")
        return x

    def objective(params):
        y, updates = sw.pure(model)(sw.bind(params, state, rng=key, train=True), X)
        return y.sum() + updates.losses["size"], updates

    return jax.value_and_grad(objective, has_aux=True)(params)


TREES = (
    {"blocks": {"scale": jnp.ones((2, 4))}, "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}},
    {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
)


def test_no_tracer_leaks_from_a_whole_step():
    with jax.checking_leaks():
        jax.jit(train_step)(*TREES, jax.random.key(0))
        jax.eval_shape(lambda x: sw.spec(lambda v, x: L.Scan(block, 2)(v.b, x), x) and x, X)


def test_collectors_go_without_the_garbage_collector(monkeypatch):
    made = []
    real = core_vars.Collector

    def watched(*args):
        collector = real(*args)
        made.append(weakref.ref(collector))
        return collector

    monkeypatch.setattr(core_vars, "Collector", watched)
    gc.collect()
    gc.disable()
    try:
        jax.jit(lambda *xs: train_step(*xs))(*TREES, jax.random.key(0))
        assert made
        assert not [ref for ref in made if ref() is not None]
    finally:
        gc.enable()


def test_a_cursor_as_a_pytree():
    v = sw.bind({"a": {"w": X}}, {"a": {"n": X}}, rng=0)
    assert len(jax.tree.leaves(v)) == 2
    assert len(jax.tree.leaves(v.fork())) == 6  # the key, its place and how deep it is go along
    doubled = jax.tree.map(lambda x: 2 * x, v)
    assert np.array_equal(sw.params(doubled)["a"]["w"], 2 * X)
    assert jax.tree.structure(v.a) == jax.tree.structure(v.a)
