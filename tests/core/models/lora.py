"""LoRA by path pattern: low-rank updates of a frozen model that is not touched (Hu et al. 2021, arXiv:2106.09685)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core import paths

apply = jax.jit(sw.apply, static_argnums=0, static_argnames=("rng", "train", "policy", "capture"))


def model(v, x):
    for i in range(2):
        x = x + L.Dense(8)(v.blocks[i].down, jax.nn.relu(L.Dense(16)(v.blocks[i].up, x)))
    return L.Dense(3)(v.head, x)


def lora(key, params, pattern, rank):
    """Two thin matrices for each matrix whose path fits ``pattern``; the second starts at zero."""
    chosen = [(path, p) for path, p in paths.leaves(params) if paths.matches(pattern, "/".join(path))]
    if not chosen:
        raise ValueError(f"no parameter fits {pattern!r}")
    keys = jax.random.split(key, len(chosen))
    return {
        path: {"a": jax.random.normal(k, (p.shape[0], rank)) / rank, "b": jnp.zeros((rank, p.shape[1]))}
        for k, (path, p) in zip(keys, chosen, strict=True)
    }


def adapted(params, adapters):
    """The tree of the model with the updates added: any function that takes the one takes the other."""
    return paths.overlay(
        params, paths.nest((p, paths.subtree(params, p) + m["a"] @ m["b"]) for p, m in adapters.items())
    )


X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


@functools.cache
def weights():
    return jax.device_get(sw.init(model, 0, X))


def test_only_the_chosen_paths_change():
    params, _ = weights()
    adapters = jax.device_get(lora(jax.random.key(1), params, "blocks/*/up/kernel", 2))
    assert list(adapters) == [("blocks", "0", "up", "kernel"), ("blocks", "1", "up", "kernel")]
    before, _ = apply(model, params, {}, X)
    assert np.array_equal(apply(model, adapted(params, adapters), {}, X)[0], before)

    gradient = jax.device_get(jax.jit(jax.grad(lambda a: apply(model, adapted(params, a), {}, X)[0].sum()))(adapters))
    trained = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, gradient)
    assert not np.allclose(apply(model, adapted(params, trained), {}, X)[0], before)
    assert np.array_equal(adapted(params, trained)["head"]["kernel"], params["head"]["kernel"])


def test_the_adapters_are_no_parameters_of_the_model():
    params, _ = weights()
    adapters = paths.nest(lora(jax.random.key(1), params, "head/kernel", 2).items())
    with pytest.raises(sw.DeclarationError, match=r"head/kernel is declared as a variable .* scope there with a, b"):
        apply(model, paths.overlay(params, adapters), {}, X)


if __name__ == "__main__":
    params, _ = sw.init(model, 0, X)
    adapters = lora(jax.random.key(1), params, "**/kernel", 2)
    print({"/".join(path): sum(leaf.size for leaf in m.values()) for path, m in adapters.items()})
