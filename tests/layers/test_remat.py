"""Remat changes memory, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L


@sw.layer
def block(v, x):
    y = L.BatchNorm()(v.norm, jnp.tanh(L.Dense(4)(v.dense, x)))
    v.loss("size", jnp.mean(jnp.square(y)))
    v.sow("inside", y)
    v.check(jnp.isfinite(y), "not finite")
    return x + L.Dropout(0.5)(v.drop, y)


def test_gives_the_same_result_effects_and_gradient(draw, weights):
    x = draw(8, 4)
    params, state = weights(block, x), {"norm": {"mean": np.zeros(4, "float32"), "var": np.ones(4, "float32")}}
    policies = (None, jax.checkpoint_policies.dots_saveable)

    def run(layer, params, state, x):
        def objective(params):
            y, updates = sw.pure(lambda v, x: layer(v.place, x))(
                sw.bind(params, {"place": state}, rng=3, train=True), x
            )
            return jnp.sum(jnp.sin(y)), (y, updates)

        return jax.value_and_grad(objective, has_aux=True)({"place": params})

    layers = [block, *(L.Remat(block, policy) for policy in policies)]
    plain, *others = jax.jit(lambda *arrays: [run(layer, *arrays) for layer in layers])(params, state, x)
    for policy, again in zip(policies, others, strict=True):
        assert again[0][1][1].checks["place"] == {"not finite": True}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(policy)),  # noqa: B023
            again, plain,
        )  # fmt: skip


def test_keeps_the_paths_and_the_first_values():
    x = jnp.ones((2, 4))
    plain, again = sw.spec(block, x), sw.spec(L.Remat(block), x)
    assert plain == again


def test_saves_what_the_policy_says():
    def residuals(policy):
        model = L.Remat(lambda v, x: jnp.sin(jnp.sin(jnp.sin(x))), policy)
        pull = jax.eval_shape(lambda x: jax.vjp(lambda x: model({}, x), x)[1], np.ones(7, "float32"))
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert residuals(None) == residuals("nothing_saveable") == 7
    assert residuals("everything_saveable") == 21


def test_passes_options_on(draw, weights):
    layer, x = L.MultiHeadAttention(2), draw(1, 3, 4)
    params, mask = weights(layer, x), np.eye(3, dtype=bool)[None, None]
    ours, plain, blind = jax.jit(
        lambda params, x, mask: (L.Remat(layer)(params, x, mask=mask), layer(params, x, mask=mask), layer(params, x))
    )(params, x, mask)
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    assert not np.allclose(plain, blind, rtol=1e-3)  # so the mask says something


def test_refuses_an_unknown_policy():
    with pytest.raises(sw.ConfigError, match="'dots' is no remat policy"):
        L.Remat(block, "dots")


@sw.layer
def flagged(v, x, double, how="tanh"):
    y = L.Dense(4)(v.dense, x)
    return getattr(jnp, how)(2 * y if double else y)


def test_what_is_no_array_is_left_alone(draw, weights):
    x = draw(2, 4)
    params = weights(flagged, x, True)

    def run(layer, params, x):
        return jax.value_and_grad(lambda p, x: layer(p, x, True, how="sin").sum(), (0, 1))(params, x)

    again = L.Remat(flagged)
    ours, plain = jax.jit(lambda params, x: (run(again, params, x), run(flagged, params, x)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)
    assert "remat" in str(jax.make_jaxpr(lambda p, x: again(p, x, True))(params, x))
