"""ZeRO-1: whole parameters, moments in pieces, the numbers of one device. Offload: moments in the host's memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood import parallel
from sapwood.inspection import layout
from sapwood.metrics import compute
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import supervised
from sapwood.train.state import offload
from sapwood.train.state import plan as state_plan

DRAW = np.random.default_rng(0)
BATCHES = [{"x": DRAW.normal(size=(16, 16)).astype("f"), "label": DRAW.integers(8, size=16)} for _ in range(4)]


@sw.layer
def model(v, x):
    x = jax.nn.relu(L.Dense(24, axes=("embed", "mlp"))(v.up, x))
    return L.Dense(8, axes=("mlp", "embed"))(v.down, x)


OBJECTIVE = supervised(model, inputs="x")
# with the usual eps Adam makes of a gradient that is all rounding a step like any other
ADAM = optax.adamw(1e-2, eps=1e-3)


def trainer(mesh=None, rules=None, optimizer=ADAM, **options):
    if rules is not None:
        rules = dataclasses.replace(parallel.table(rules), min_size=1)
    return sw.Trainer(OBJECTIVE, optimizer, mesh=mesh, rules=rules, **options)


def run(train):
    state = train.init(0, BATCHES[0])
    step = jax.jit(train.step)
    losses = []
    for batch in BATCHES:
        state, found = jax.block_until_ready(step(state, train.put(batch)))
        losses.append(float(compute(found)["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def single():
    return run(trainer(ema=0.9, clip=1.0))


def pieces(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.size // x.addressable_shards[0].data.size
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(found, expected):
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    for name in ("params", "opt_state", "ema"):
        for a, b in zip(*(jax.tree.leaves(getattr(x[0], name)) for x in (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.costs("the training of a mesh is compiled")
@pytest.mark.parametrize(
    ("rules", "mesh", "params", "moments"),
    [
        ("zero1", "data=8", {1}, {8}),
        ("zero1+tensor", "replica=2,data=2,tensor=2", {1, 2}, {4, 8}),
        pytest.param("zero1", "fsdp=8", {1}, {8}, marks=pytest.mark.slow),
        pytest.param("zero1+fsdp", "replica=2,fsdp=4", {4}, {8}, marks=pytest.mark.slow),
    ],
)
def test_parameters_are_whole_moments_in_pieces_and_the_numbers_those_of_one_device(
    rules, mesh, params, moments, single
):
    found = run(trainer(mesh, rules, ema=0.9, clip=1.0))
    state = found[0]
    assert set(pieces(state.params).values()) == params
    assert set(pieces(state.opt_state[0].mu).values()) == set(pieces(state.opt_state[0].nu).values()) == moments
    assert set(pieces(state.ema).values()) == moments
    assert_same(found, single)


def test_the_compiled_step_holds_no_whole_moments():
    train = trainer("data=8", "zero1")
    plan = state_plan.plan(train, BATCHES[0])
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=train.batch_sharding)
              for name, x in BATCHES[0].items()}  # fmt: skip
    memory = train.compiled.train(plan.shardings).lower(plan.shapes, shapes).compile().memory_analysis()
    params = sum(x.size * 4 for x in jax.tree.leaves(plan.shapes.params))
    batch = sum(x.nbytes // 8 for x in BATCHES[0].values())
    assert memory.argument_size_in_bytes < params + 2 * params // 8 + batch + 256  # else 3 times the parameters


@pytest.mark.costs("training is compiled with and without a mesh")
def test_micro_batches_add_up_in_pieces():
    found, expected = (run(trainer(*where, accumulate=2)) for where in (("data=8", "zero1"), ()))
    assert set(pieces(found[0].opt_state[0].mu).values()) == {8}
    assert_same(found, expected)


def test_what_cannot_be_split_further_is_whole_with_a_warning_that_names_it():
    spec = {"up": {"kernel": sw.core.param.Param((130, 254), jnp.float32, None, ("embed", "mlp"))}}
    mesh = parallel.mesh("data=8")
    with pytest.warns(
        parallel.ShardingWarning, match=r"beside up/kernel: no dimension of \(130, 254\) divides by data=8"
    ):
        found = parallel.moment_shardings(spec, mesh, "zero1")
    assert found == parallel.param_shardings(spec, mesh, "zero1")


# ---- offload --------------------------------------------------------------------------------------------------------


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_the_optimizers_state_stays_in_host_memory_between_steps(monkeypatch, single):
    monkeypatch.setattr(offload, "SMALL", 2)
    train = trainer("data=2,fsdp=4", "fsdp", ema=0.9, clip=1.0, offload="optimizer")
    found = run(train)
    for state in (train.init(0, BATCHES[0]), found[0]):
        assert kinds(state.opt_state[0].mu) == kinds(state.opt_state[0].nu) == {offload.HOST}
    assert kinds(found[0].params) == kinds(found[0].opt_state[0].count) == {"device"}
    assert_same(found, single)


def test_an_offloaded_state_goes_through_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "SMALL", 2)
    train = trainer("data=8", "data", offload="optimizer")
    state = train.init(0, BATCHES[0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
    back, _ = Checkpoints(tmp_path).restore(state_plan.plan(train, BATCHES[0]).shapes)
    assert kinds(back.opt_state[0].mu) == {offload.HOST}
    jax.tree.map(np.testing.assert_array_equal, back.opt_state, state.opt_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "optimiser", "mesh": "data=8"}, "offload='optimiser'): expected 'optimizer', or None"),
        ({"offload": True, "mesh": "data=8"}, "offload=True): expected 'optimizer', or None"),
        ({"offload": "optimizer"}, 'needs a mesh, of one device too: mesh="data=-1"'),
    ],
)
def test_a_wrong_offload_says_so(options, message):
    with pytest.raises(sw.ConfigError, match=re.escape(message)):
        sw.Trainer(OBJECTIVE, ADAM, **options)


def test_a_platform_without_host_memory_says_what_else_there_is(monkeypatch):
    monkeypatch.setattr(offload, "memories", lambda device: {"device"})
    with pytest.raises(sw.ConfigError, match=r"platform 'cpu' cannot reach memory of the kind 'pinned_host' .*zero1"):
        sw.Trainer(OBJECTIVE, ADAM, mesh="data=8", offload="optimizer")


def test_the_layout_of_an_offloaded_state_needs_no_devices(monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 2)
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    found = layout(trainer(mesh, "data", offload="optimizer"), BATCHES[0])
    moments = 2 * (16 * 24 + 24 + 24 * 8 + 8) * 4
    assert f"its host {moments / 1024:.1f} KiB" in found.totals


# ---- a mesh in words ------------------------------------------------------------------------------------------------


def test_a_trainer_takes_its_mesh_as_a_string():
    train = sw.Trainer(OBJECTIVE, ADAM, mesh="replica=2,fsdp=2,tensor=2", rules="fsdp+tensor")
    assert train.mesh == parallel.mesh(replica=2, fsdp=2, tensor=2)
    with pytest.raises(sw.ConfigError, match="unknown axis 'fdsp'; did you mean 'fsdp'"):
        sw.Trainer(OBJECTIVE, ADAM, mesh="fdsp=8")
