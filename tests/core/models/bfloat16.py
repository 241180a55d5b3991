"""A bfloat16 policy: parameters and statistics are stored in float32, layers compute in bfloat16."""

import functools

import jax
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def model(v, x):
    x = L.BatchNorm()(v.norm, L.Dense(8)(v.hidden, x))
    v.sow("hidden", x)
    return L.Dense(2)(v.out, jax.nn.relu(x))


X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


@functools.cache
def weights(policy=None):
    return sw.init(model, 0, X, policy=policy)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_compute_in_bfloat16_store_in_float32():
    params, state = weights("bfloat16")
    y, after, captured = apply(model, params, state, X, policy="bfloat16", train=True, capture=True)
    assert dtypes((params, state, after)) == {"float32"}
    assert dtypes((y, captured)) == {"bfloat16"}
    full, after_full = apply(model, params, state, X, train=True)
    assert np.allclose(y, full, atol=0.1)
    assert not np.array_equal(y, full)
    assert np.allclose(after["norm"]["mean"], after_full["norm"]["mean"], atol=1e-2)


def test_gradients_have_the_dtype_of_the_parameters():
    params, state = weights()
    run = lambda p: apply(model, p, state, X, policy="bfloat16")[0].astype("float32").sum()  # noqa: E731
    assert dtypes(jax.eval_shape(jax.grad(run), params)) == {"float32"}


def test_storage_in_bfloat16():
    policy = sw.Policy("bfloat16", param="bfloat16")
    params, state = weights(policy)
    assert dtypes(params) == {"bfloat16"}
    assert dtypes(state) == {"float32"}
    wide, _ = weights()
    rounded = np.asarray(wide["out"]["kernel"]).astype("bfloat16")
    assert np.array_equal(params["out"]["kernel"], rounded)  # the same numbers


def test_dtypes_that_are_none():
    with pytest.raises(sw.ConfigError, match=r"must be a floating dtype such as 'float32', .* not 'bf16'"):
        apply(model, *weights(), X, policy="bf16")
    with pytest.raises(sw.ConfigError, match="not 'int8'"):
        sw.Policy("int8")


if __name__ == "__main__":
    for policy in ("float32", "bfloat16"):
        print(policy, apply(model, *weights(), X, policy=policy)[0][0])
