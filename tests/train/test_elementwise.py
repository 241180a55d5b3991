"""That each optimizer that is known to treat each number alone gives a stack what it gives its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood.train.optimizers.elementwise import KNOWN, is_elementwise

GIVEN = {
    "scale": (0.5,), "scale_by_schedule": (lambda count: 1 / (1.0 + count),), "trace": (0.9,), "ema": (0.9,),
    "clip": (0.5,), "clip_by_global_norm": (0.5,), "add_decayed_weights": (0.1,),
}  # fmt: skip
STACK = {"w": np.random.default_rng(0).normal(size=(3, 4)).astype("float32")}
BLOCKS = {"w": {str(i): x for i, x in enumerate(STACK["w"])}}


def made(name):
    return getattr(optax, name)(*GIVEN.get(name, ()))


def after(name, tree, steps=3):
    optimizer = optax.with_extra_args_support(made(name))
    params, state = tree, optimizer.init(tree)
    for step in range(1, steps + 1):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(step * jnp.asarray(x)), tree)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_each_of_them_does_to_a_stack_what_it_does_to_its_blocks():
    names = sorted(KNOWN)
    assert all(is_elementwise(made(name)) for name in names)
    both = jax.jit(lambda stack, blocks: {name: (after(name, stack), after(name, blocks)) for name in names})
    for name, (stack, blocks) in both(STACK, BLOCKS).items():
        expected = np.stack([blocks["w"][str(i)] for i in range(3)])
        np.testing.assert_allclose(stack["w"], expected, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "optimizer",
    [optax.scale_by_trust_ratio(), optax.adaptive_grad_clip(0.1), optax.clip_by_block_rms(1.0), optax.adafactor(0.1),
     optax.adamw(0.1, mask={"w": True}), optax.masked(optax.scale(2.0), lambda tree: tree), optax.scale(np.ones(4)),
     optax.inject_hyperparams(optax.sgd)(0.1), optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
     optax.chain(optax.sgd(0.1), optax.lamb(0.1)), optax.contrib.muon(0.1),
     optax.stateless(lambda updates, params: updates)],
)  # fmt: skip
def test_what_may_look_at_more_is_not_one_of_them(optimizer):
    assert not is_elementwise(optimizer)


def test_one_of_the_users_own_is_not_one_of_them():
    def scale():
        return optax.GradientTransformation(optax.scale(1.0).init, lambda updates, state, params=None: (updates, state))

    assert not is_elementwise(scale())


def test_the_comparison_can_fail():
    stack, blocks = after("scale_by_trust_ratio", STACK), after("scale_by_trust_ratio", BLOCKS)
    assert not np.allclose(stack["w"], np.stack([blocks["w"][str(i)] for i in range(3)]), rtol=1e-2)
