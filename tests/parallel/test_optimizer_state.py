"""Optimizer state lies beside its parameter, by structure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood.core.param import Param
from sapwood.parallel import mesh, opt_shardings, param_shardings

MESH = mesh("data=2,fsdp=4")
# `twin` has the shape of `up` but another layout: matching by shape would mix them up
PARAMS = {
    "up": {"kernel": Param((256, 512), jnp.float32, None, None), "bias": Param((512,), jnp.float32, None, None)},
    "twin": {"kernel": Param((256, 512), jnp.float32, None, ("embed", "kv"))},
    "square": {"kernel": Param((256, 256), jnp.float32, None, None)},
}
UP, TWIN, SQUARE, BIAS = (None, "fsdp"), ("fsdp", None), ("fsdp", None), (None,)
LIKE_PARAMS = {"up": {"kernel": UP, "bias": BIAS}, "twin": {"kernel": TWIN}, "square": {"kernel": SQUARE}}


def matrices(params):
    return jax.tree.map(lambda p: len(p.shape) > 1, params)


def groups(params):
    return {name: "slow" if name == "up" else "fast" for name in params}


def layout(optimizer):
    shardings = opt_shardings(optimizer, PARAMS, param_shardings(PARAMS, MESH), MESH)
    return jax.tree.map(lambda s: tuple(s.spec), shardings)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(1e-3),
    "adafactor": optax.adafactor(1e-3, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10))),
    "masked": optax.masked(optax.adam(1e-3), matrices),
    "prefix": optax.masked(optax.adam(1e-3), {"up": True, "twin": False, "square": False}),
    "multi": optax.multi_transform({"slow": optax.adam(1e-4), "fast": optax.sgd(0.1, momentum=0.9)}, groups),
    "steps": optax.MultiSteps(optax.adam(1e-3), 4),
    "lbfgs": optax.lbfgs(memory_size=3),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "plateau": optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    "finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "muon": optax.contrib.muon(1e-3),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
    "novograd": optax.novograd(1e-3),
    "sm3": optax.sm3(1e-3),
    "lookahead": optax.lookahead(optax.adam(1e-3), 5, 0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_layout_fits_what_init_returns_and_is_where_it_puts_it(name):
    optimizer = OPTIMIZERS[name]
    shardings = param_shardings(PARAMS, MESH)
    params = jax.tree.map(lambda p, s: jax.device_put(np.zeros(p.shape, "f"), s), PARAMS, shardings)
    expected = opt_shardings(optimizer, PARAMS, shardings, MESH)
    state = jax.jit(optimizer.init, out_shardings=expected)(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == sharding
    eager = jax.tree.map(jnp.shape, jax.eval_shape(optimizer.init, params))
    assert jax.tree.map(jnp.shape, state) == eager


def test_adam():
    adam = layout(optax.adam(1e-3))[0]
    assert adam.mu == adam.nu == LIKE_PARAMS
    assert adam.count == ()


def test_a_chain_with_a_schedule():
    _, (adam, _, schedule) = layout(OPTIMIZERS["chain"])
    assert adam.mu == LIKE_PARAMS
    assert schedule.count == ()


def test_adafactor_keeps_the_dimension_that_its_factor_keeps():
    factored = layout(OPTIMIZERS["adafactor"])[0]
    # optax: a row factor averages over the largest dimension, a column factor over the second largest
    assert factored.v_row["up"]["kernel"] == (None,)
    assert factored.v_col["up"]["kernel"] == ("fsdp",)
    assert factored.v_row["twin"]["kernel"] == ("fsdp",)
    assert factored.v_col["twin"]["kernel"] == (None,)
    assert factored.v_row["square"]["kernel"] == factored.v_col["square"]["kernel"] == ()  # either would fit
    assert factored.v["up"]["bias"] == BIAS
    assert factored.v["up"]["kernel"] == ()  # a placeholder of one element


def test_what_a_mask_cuts_out_has_no_state():
    inner = layout(OPTIMIZERS["masked"]).inner_state[0]
    assert inner.mu["up"] == {"kernel": UP, "bias": optax.MaskedNode()}
    assert inner.mu["twin"] == {"kernel": TWIN}
    prefix = layout(OPTIMIZERS["prefix"]).inner_state[0]
    assert prefix.nu == {"up": {"kernel": UP, "bias": BIAS}, "twin": optax.MaskedNode(), "square": optax.MaskedNode()}


def test_groups_of_parameters_each_keep_their_layout():
    inner = layout(OPTIMIZERS["multi"]).inner_states
    assert inner["slow"].inner_state[0].mu["up"] == {"kernel": UP, "bias": BIAS}
    assert inner["slow"].inner_state[0].mu["twin"] == optax.MaskedNode()
    assert inner["fast"].inner_state[0].trace["twin"]["kernel"] == TWIN


def test_accumulated_gradients():
    steps = layout(OPTIMIZERS["steps"])
    assert steps.acc_grads == LIKE_PARAMS
    assert steps.inner_opt_state[0].mu == LIKE_PARAMS
    assert steps.mini_step == ()


def test_the_history_of_lbfgs_has_a_leading_dimension():
    lbfgs = layout(OPTIMIZERS["lbfgs"])[0]
    assert lbfgs.params == lbfgs.updates == LIKE_PARAMS
    memory = jax.tree.map(lambda spec: (None, *spec), LIKE_PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    assert lbfgs.diff_params_memory == lbfgs.diff_updates_memory == memory
    assert lbfgs.weights_memory == ()


def test_one_number_for_a_parameter_is_whole():
    assert layout(OPTIMIZERS["novograd"])[0].nu["up"]["kernel"] == ()


def test_a_parameter_named_like_a_counter_does_not_confuse_it():
    params = {"count": Param((256, 512), jnp.float32, None, None)}
    for optimizer in (optax.adam(1e-3), optax.lbfgs(memory_size=3)):
        first = opt_shardings(optimizer, params, param_shardings(params, MESH), MESH)[0]
        assert tuple(first.count.spec) == ()
        tree = first.mu if hasattr(first, "mu") else first.params
        assert tuple(tree["count"].spec) == UP
