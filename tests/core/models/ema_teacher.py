"""A mean teacher: the same network with averaged parameters says what the student should say (arXiv:1703.01780)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def net(v, x):
    x = L.Dropout(0.5)(v.drop, jnp.tanh(L.BatchNorm()(v.norm, L.Dense(8)(v.hidden, x))))
    return L.Dense(2)(v.out, x)


def consistency(v, x, teacher):
    """How far the student is from its teacher, whose ``params`` and ``state`` are a plain tree each."""
    calm = v.replace(params=teacher[0], state=teacher[1], train=False)
    return jnp.mean((net(v, x) - jax.lax.stop_gradient(net(calm, x))) ** 2)


X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")


@functools.cache
def weights():
    return jax.device_get(sw.init(net, 0, X))


def test_the_teacher_is_calm_and_only_the_student_learns():
    params, state = weights()
    teacher = jax.tree.map(lambda p: p + 0.1, (params, state))
    run = jax.value_and_grad(
        lambda p, t: apply(consistency, p, state, X, t, rng=1, train=True), has_aux=True, argnums=(0, 1)
    )
    (distance, after), (student, gradient) = jax.jit(run)(params, teacher)
    assert not any(map(np.any, jax.tree.leaves(gradient)))
    assert np.any(student["hidden"]["kernel"])
    assert not np.array_equal(after["norm"]["mean"], state["norm"]["mean"])  # the student's own statistics moved
    calm, _ = apply(net, *teacher, X)
    loud, _ = apply(net, params, state, X, rng=1, train=True)
    assert np.allclose(distance, np.mean((np.asarray(loud) - calm) ** 2))


def test_a_teacher_in_train_mode_would_lose_its_statistics():
    params, state = weights()

    def wrong(v, x):
        return net(v.replace(params=params, state=state), x)

    with pytest.raises(
        sw.EffectError, match=r"norm: put\(mean=...\) on a cursor whose state was replaced would be lost"
    ):
        apply(wrong, {}, {}, X, rng=1, train=True)


def test_its_statistics_by_pure():
    params, state = weights()
    both = lambda v, x: sw.pure(net)(v.replace(params=params, state=state), x)[1].state  # noqa: E731
    moved, untouched = apply(both, {}, {}, X, rng=1, train=True)
    assert untouched == {}
    assert moved["norm"]["mean"].shape == (8,)


def test_a_teacher_of_another_network():
    params, state = weights()
    with pytest.raises(sw.DeclarationError, match=r"params has no 'hidden/kernel' .* at '\(root\)' it holds other"):
        apply(consistency, params, state, X, ({"other": params}, state), rng=1, train=True)


if __name__ == "__main__":
    params, state = weights()
    teacher = params, state

    @jax.jit
    def step(params, state, teacher, key):
        run = lambda p: sw.apply(consistency, p, state, X, teacher, rng=key, train=True)  # noqa: E731
        (loss, state), gradient = jax.value_and_grad(run, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return loss, params, state, jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, teacher, (params, state))

    for i in range(5):
        loss, params, state, teacher = step(params, state, teacher, jax.random.key(i))
        print(f"step {i}: student and teacher differ by {loss:.4f}")
