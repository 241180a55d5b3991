"""An optimizer does to a scanned stack what it does to the unrolled model, as benchmarks/optimizers.py measures it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from benchmarks import optimizers
from sapwood import layers as L
from sapwood import parallel
from sapwood.core.errors import ConfigError
from sapwood.core.jaxpr import equations
from sapwood.core.param import Param, Stacked
from sapwood.models import Decoder
from sapwood.train import blockwise, matrices, supervised

QUICK = ["adamw, decay of matrices", "adafactor", "lamb", "muon", "sm3", "clip_by_global_norm, prodigy", "MultiSteps"]
SMALL = ["embed/table", "blocks/up/kernel", "blocks/up/bias"]
DRAW = np.random.default_rng(0)
BATCH = {"x": DRAW.normal(size=(4, 6)).astype("f"), "label": DRAW.integers(3, size=4)}
N = 3


def block(v, x):
    return x + L.Dense(6)(v.down, jnp.tanh(L.Dense(8)(v.up, x)))


def scanned(v, x):
    return L.Dense(3)(v.out, L.Scan(block, N)(v.blocks, x))


def unrolled(v, x):
    for i in range(N):
        x = block(v.blocks[i], x)
    return L.Dense(3)(v.out, x)


@functools.cache
def trainer(model=scanned, optimizer=None, **options):
    return sw.Trainer(supervised(model, inputs="x"), optimizer or optax.contrib.muon(0.1), **options)


@functools.cache
def trained(train, steps=2):
    state, step = train.init(0, BATCH), jax.jit(train.step)
    for _ in range(steps):
        state, _ = step(state, BATCH)
    return state


def born(train):
    return jax.eval_shape(lambda: train.init(0, BATCH))


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_stacks_get_the_updates_of_the_unrolled_tree(name, monkeypatch):
    """On a smaller tree; LAMB on a mesh."""
    monkeypatch.setattr(optimizers, "LAYOUT", {path: optimizers.LAYOUT[path] for path in SMALL})
    where = optimizers.WHERE[name == "lamb" :][:1]
    found = optimizers.differences(name, optimizers.optimizers()[name], "float64", where)
    assert list(found) == list(where)
    assert max(found.values()) < optimizers.BOUNDS["float64"]


@pytest.mark.long
def test_every_optimizer_of_optax():
    """An hour of two cores."""
    assert not optimizers.failed(optimizers.table())


def test_the_committed_table_has_every_optimizer_within_the_bound():
    found = json.loads(optimizers.RESULTS.read_text())
    assert list(found["differences"]) == list(optimizers.optimizers())
    assert found["exceptions"] == optimizers.EXCEPTIONS
    assert found["rounded"] == optimizers.ROUNDED
    assert len(optimizers.EXCEPTIONS) + len(optimizers.ROUNDED) <= 6
    assert not optimizers.failed(found["differences"])
    assert all(set(by) == set(optimizers.BOUNDS) for by in found["differences"].values())


@pytest.mark.slow
def test_the_table_can_fail(monkeypatch):
    """Without the blocks, the decay of matrices reaches the biases of a stack."""
    monkeypatch.setattr(optimizers, "blockwise", lambda optimizer, params: optimizer)
    monkeypatch.setattr(optimizers, "LAYOUT", {path: optimizers.LAYOUT[path] for path in SMALL})
    name = "adamw, decay of matrices"
    assert optimizers.differences(name, optimizers.optimizers()[name], "float64", ["one device"])["one device"] > 1e-2


# ---- how long the program is -----------------------------------------------------------------------------------------


def length(optimizer, n):
    """The operations of an update, and those of the unrolled tree's."""
    kernel, bias = (Param((n, *shape), "float32", None, None, (Stacked(1, n, None),)) for shape in ((8, 12), (12,)))
    declared = {"blocks": {"kernel": kernel, "bias": bias}, "head": {"w": Param((4, 4), "float32", None, None)}}
    params = jax.tree.map(lambda param: param.struct, declared)
    seen = blockwise(optimizer, declared)
    state = jax.eval_shape(seen.init, params)
    return len(list(equations(jax.make_jaxpr(seen.update)(params, state, params).jaxpr)))


@pytest.mark.parametrize("name", ["adamw, decay of matrices", "adafactor", "lamb", "muon", "muon, aol", "MultiSteps"])
def test_the_program_is_as_long_for_many_blocks_as_for_two(name):
    make = optimizers.optimizers()[name]
    assert length(make(), 2) == length(make(), 7)


def test_blocks_that_differ_are_done_one_by_one():
    def first(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "'0'" in str(path), params)

    decay = optax.add_decayed_weights(1.0, mask=first)
    assert length(optax.adam(0.1), 7) < length(optax.chain(optax.adam(0.1), decay), 7) < 2 * length(optax.adam(0.1), 7)


# ---- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_scanned_model_trains_as_the_unrolled_one():
    optimizer = optax.lars(0.1)
    found, expected = (trained(trainer(model, optimizer)).params for model in (scanned, unrolled))
    for a, b in zip(jax.tree.leaves(sw.unstack(found["blocks"])), jax.tree.leaves(expected["blocks"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_matrices_of_a_stack_go_to_newton_schulz_and_biases_to_adam():
    state = born(trainer()).opt_state.inner_states
    assert names(state["muon"].inner_state[0].mu) == {"blocks/down/kernel", "blocks/up/kernel", "out/kernel"}
    assert names(state["adam"].inner_state[0].mu) == {"blocks/down/bias", "blocks/up/bias", "out/bias"}


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1), optax.lamb(0.1), optax.lbfgs(memory_size=3)])
def test_what_mirrors_the_parameters_lies_as_before(optimizer):
    """So checkpoints of such optimizers are read as ever; a history's dimension stays before those of the stack."""
    made = born(trainer(optimizer=optimizer))
    assert shapes(made.opt_state) == shapes(jax.eval_shape(optimizer.init, made.params))


def test_a_new_start_sees_blocks_too():
    again = jax.eval_shape(trainer().restart, born(trainer(optimizer=optax.lars(0.1))))
    assert shapes(again.opt_state) == shapes(born(trainer()).opt_state)


def test_plain_python_gives_the_optimizer_blocks_to_look_at():
    told = []

    def update(updates, state, params=None):
        told.append({type(x).__name__ for x in jax.tree.leaves(updates)})
        return jax.tree.map(lambda g: g / abs(g).max(), updates), state

    params = {"blocks": {"up": np.float32([[1, 2], [8, 4]])}}
    tree = {"blocks": {"up": Param((2, 2), "float32", None, None, (Stacked(1, 2, None),))}}
    with jax.disable_jit():
        updates, _ = blockwise(optax.GradientTransformation(lambda _: (), update), tree).update(params, ())
    np.testing.assert_array_equal(updates["blocks"]["up"], [[0.5, 1], [1, 0.5]])
    assert told == [{"ndarray"}]


def test_a_state_made_without_blocks_is_refused():
    state = born(trainer())
    other = state.replace(opt_state=jax.eval_shape(trainer().optimizer.init, state.params))
    with pytest.raises(ConfigError, match=r"the optimizer's state does not fit .* Trainer\.init"):
        jax.eval_shape(trainer().step, other, BATCH)


def test_a_state_made_by_hand_is_asked_of_the_model():
    state = born(trainer()).replace(stacks=None)
    assert jax.eval_shape(trainer().step, state, BATCH)[0].opt_state is not None
    with pytest.raises(ConfigError, match=r"Trainer\.init"):
        trainer().restart(state)


def test_stacks_that_do_not_train_are_not_the_optimizers():
    train = trainer(optimizer=optax.lamb(0.1), trainable="out")
    after = jax.eval_shape(train.step, born(train), BATCH)[0]
    assert names(after.opt_state[0].mu) == {"out/bias", "out/kernel"}


# ---- in a loop of one's own ------------------------------------------------------------------------------------------


def declared():
    return sw.spec(scanned, BATCH["x"]).params


def test_a_mask_is_told_the_names_and_shapes_of_blocks():
    told = {}

    def mask(params):
        told.update({name: x.shape for name, x in zip(sorted(names(params)), jax.tree.leaves(params), strict=True)})
        return jax.tree.map(lambda _: True, params)

    params = jax.tree.map(lambda param: param.struct, declared())
    jax.eval_shape(blockwise(optax.add_decayed_weights(0.1, mask=mask), declared()).init, params)
    kinds = {"down/bias": (6,), "down/kernel": (8, 6), "up/bias": (8,), "up/kernel": (6, 8)}
    expected = {f"blocks/{i}/{name}": shape for i in range(N) for name, shape in kinds.items()}
    assert told == expected | {"out/bias": (3,), "out/kernel": (6, 3)}


def test_functions_among_the_arguments_take_and_give_stacks():
    seen = []

    def update(updates, state, params, *, both, other):
        grads = both(params, other)
        assert jax.tree.structure(grads) == jax.tree.structure(other) == jax.tree.structure(updates)
        return jax.tree.map(lambda g, o: g / jnp.linalg.norm(o), grads, other), state

    def both(params, other):
        seen.append(shapes((params, other)))
        return jax.tree.map(lambda p, o: p * o, params, other)

    params = jax.tree.map(lambda param: DRAW.normal(size=param.shape).astype("f"), declared())
    made = blockwise(optax.GradientTransformationExtraArgs(lambda _: (), update), declared())
    updates, _ = jax.jit(lambda p: made.update(p, (), p, both=both, other=p))(params)
    assert seen == [(shapes(params), shapes(params))]
    kernel = params["blocks"]["up"]["kernel"]
    expected = kernel**2 / jnp.linalg.norm(kernel, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(updates["blocks"]["up"]["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["muon", "adafactor", "sm3", "lbfgs, no line search", "novograd"])
def test_the_layout_of_its_state_is_that_of_each_block(name):
    """Four blocks of 4x8: by shape alone, a factor of one is told from that of the stack by nothing."""
    param = Param((4, 4, 8), "float32", None, None, (Stacked(1, 4, None),))
    tree, mesh = {"blocks": {"w": param}}, sw.mesh("stage=4,fsdp=2")
    spec = jax.sharding.PartitionSpec("stage", None, "fsdp")
    where = {"blocks": {"w": jax.sharding.NamedSharding(mesh, spec)}}
    optimizer = blockwise(optimizers.optimizers()[name](), tree)
    found = parallel.opt_shardings(optimizer, tree, where, mesh)
    state = jax.eval_shape(optimizer.init, {"blocks": {"w": param.struct}})
    assert jax.tree.structure(found) == jax.tree.structure(state)
    lying = {(x.shape, tuple(s.spec)) for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)}
    if name == "adafactor":
        assert {((4, 4), ("stage", None)), ((4, 8), ("stage", "fsdp"))} <= lying
    elif name == "lbfgs, no line search":
        assert ((10, 4, 4, 8), (None, "stage", None, "fsdp")) in lying
    elif name == "muon":
        assert ((4, 4, 8), ("stage", None, "fsdp")) in lying


def test_parameters_of_another_size_are_refused():
    params = jax.tree.map(lambda param: jax.ShapeDtypeStruct((N + 1, *param.shape[1:]), "float32"), declared())
    with pytest.raises(ConfigError, match=r"blocks/down/bias is declared as 3 blocks of \(6,\)"):
        jax.eval_shape(blockwise(optax.lamb(0.1), declared()).init, params)


# ---- Muon's matrices -------------------------------------------------------------------------------------------------


def test_matrices_come_from_the_axes():
    tokens = jax.ShapeDtypeStruct((2, 5), "int32")
    spec = sw.spec(Decoder(vocabulary=16, depth=2, width=8, heads=2, bias=True), tokens).params
    numbers = matrices(spec)
    flat = {
        "/".join(str(key.key) for key in path): value and (value.reduction_axis, value.output_axis)
        for path, value in jax.tree_util.tree_leaves_with_path(
            numbers(spec), is_leaf=lambda x: x is None or hasattr(x, "_fields")
        )
    }
    matrix = ((-2,), (-1,))
    found = {name.removeprefix("blocks/"): value for name, value in flat.items() if value is not None}
    assert found.pop("attention/out/kernel") == ((-3, -2), (-1,))
    assert {found.pop(f"attention/{name}/kernel") for name in ("query", "key", "value")} == {((-3,), (-2, -1))}
    assert set(found.values()) == {matrix}
    assert set(found) == {"gate/kernel", "up/kernel", "down/kernel"}
    params = jax.tree.map(lambda param: param.struct, spec)
    state = jax.eval_shape(blockwise(optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers), spec).init, params)
    told = names(state.inner_states["muon"].inner_state[0].mu)
    assert told == {name for name, value in flat.items() if value is not None}
    with pytest.raises(ConfigError, match="blocks/0/upper/kernel is none of the parameters"):
        numbers({"blocks": {"0": {"upper": {"kernel": 1}}}})
