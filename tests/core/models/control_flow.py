"""`cond` and `while_loop` over layers with state: `sw.pure(f, full=True)` gives carries of one fixed structure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def left(v, x):
    return L.BatchNorm()(v.left, x)


def right(v, x):
    return 2 * L.BatchNorm()(v.right, x)


def branching(v, x, go_left):
    branches = [sw.pure(f, full=True) for f in (left, right)]
    y, state = jax.lax.cond(go_left, *branches, v, x)
    v.merge(state)
    return y


def count(v, x):
    n = v.state("calls", (), jax.nn.initializers.zeros, dtype="int32")
    v.put(calls=n + 1)
    return L.Dense(4, bias=False)(v.shrink, x) / 4


def until_small(v, x):
    """Apply a layer until its output is small; how often is counted in its state."""
    step = sw.pure(count, full=True)

    def body(carry):
        x, state = carry
        return step(v.replace(state=state), x)

    x, state = jax.lax.while_loop(lambda carry: jnp.abs(carry[0]).max() > 1e-3, body, (x, sw.state(v)))
    v.merge(state)
    return x


X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32") + 3


@functools.cache
def weights():
    return sw.init(branching, 0, X, jnp.array(True))


@pytest.mark.parametrize("go_left", [True, False])
def test_only_the_branch_that_ran_moves_its_state(go_left):
    params, state = weights()
    assert sorted(params) == ["left", "right"]
    y, after = apply(branching, params, state, X, np.array(go_left), train=True)
    moved, still = ("left", "right") if go_left else ("right", "left")
    assert not np.any(after[still]["mean"])
    assert np.allclose(after[moved]["mean"], 0.1 * X.mean(0), rtol=1e-4)
    assert np.allclose(y.std(0), 1 if go_left else 2, atol=1e-2)


def test_the_loop_counts_its_steps():
    params = {"shrink": {"kernel": np.eye(4, dtype="float32")}}
    y, state = jax.jit(lambda: apply(until_small, params, {"calls": np.int32(10)}, X))()
    steps = int(np.ceil(np.log(np.abs(X).max() / 1e-3) / np.log(4)))
    assert int(state["calls"]) == 10 + steps
    assert np.allclose(y, X / 4**steps)


def test_the_loop_declares():
    spec = sw.spec(lambda v, x: count(v, x), X)
    assert spec.params["shrink"]["kernel"].shape == (4, 4)
    assert spec.state["calls"].dtype == "int32"


def test_a_branch_that_writes_without_pure():
    params, state = weights()
    bare = lambda v, x, go: jax.lax.cond(go, left, right, v, x)  # noqa: E731
    with pytest.raises(sw.EffectError, match=r"left: put\(mean=...\) cannot work: .*sw.pure, return its updates") as e:
        apply(bare, params, state, X, jnp.array(True), train=True)
    assert "in left: BatchNorm() on float32[8,4]" in e.value.__notes__


def test_branches_that_hand_back_different_updates():
    params, state = weights()
    partial = lambda v, x, go: jax.lax.cond(go, sw.pure(left), sw.pure(right), v, x)  # noqa: E731
    with pytest.raises(
        TypeError, match="cond branch outputs must have the same pytree structure"
    ):  # JAX's own words; full=True is the answer
        apply(partial, params, state, X, jnp.array(True), train=True)


if __name__ == "__main__":
    params = {"shrink": {"kernel": jnp.eye(4)}}
    print("steps until small:", apply(until_small, params, {"calls": jnp.int32(0)}, X)[1]["calls"])
