"""Routing: the experts and weights of each token, expert capacity, and the losses that balance the experts.

These are array functions without variables. `MixtureOfExperts` calls them outside of its `jax.shard_map`.
"""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.errors import ConfigError, InputError
from sapwood.core.layer import describe
from sapwood.layers import check_inputs


class Routing(NamedTuple):
    """The experts of each token and the routing losses; `top_k_routing` describes the fields."""

    experts: jax.Array
    weights: jax.Array
    load: jax.Array
    balance: jax.Array
    z: jax.Array


def top_k_routing(logits: jax.Array, k: int, normalize: bool = True, mask: jax.Array | None = None) -> Routing:
    """The k experts of largest probability for each token, computed in float32 for logits of any dtype.

    Args:
        logits: `(..., experts)`, floating.
        k: experts of each token.
        normalize: whether to scale the weights of each token to a sum of 1. With k = 1 they are then all 1, and the
            router learns only from the losses. Switch does not normalize, Mixtral (k = 2) does.
        mask: boolean `(...)`, true for real tokens. The losses and `load` count only these, and are 0 if there are
            none. Other tokens get experts and weights too, which must be ignored.

    Returns:
        A `Routing`:
        experts: `(..., k)`, int32, the most probable first; among equals the lower number first.
        weights: `(..., k)`, float32, the probabilities of these experts.
        load: `(experts,)`, each expert's share of all choices.
        balance: experts x sum over the experts of load x mean probability. It is 1 if all experts are used equally, and
            `experts` if one gets everything. Its gradient passes only through the probabilities.
        z: mean over tokens of `logsumexp(logits)^2`, which keeps logits small.

    Raises:
        InputError: logits are not floating.
        ConfigError: k is below 1 or above the number of experts.

    Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021, "Switch Transformers" (arXiv:2101.03961), equations 4-6,
    of which `balance` is the form for k choices; Zoph et al. 2022, "ST-MoE" (arXiv:2202.08906), equation 5.

    >>> routing = top_k_routing(jnp.log(jnp.array([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]])), 2)
    >>> routing.experts.tolist(), routing.load.tolist()
    ([[2, 1], [0, 1]], [0.25, 0.5, 0.25])
    >>> [[f"{w:.2f}" for w in token] for token in routing.weights]
    [['0.67', '0.33'], ['0.62', '0.38']]
    """
    logits = check_inputs.floating("top_k_routing", logits).astype(jnp.float32)
    check_inputs.at_least("top_k_routing", logits, 1, "(..., experts)")
    experts = logits.shape[-1]
    few_enough("top_k_routing", k, experts)
    probabilities = jax.nn.softmax(logits)
    chosen = _largest(lax.stop_gradient(probabilities), k)
    hot = jax.nn.one_hot(chosen, experts)
    weights = jnp.sum(probabilities[..., None, :] * hot, -1)  # no gather: its gradient is a scatter
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    load = mean_of_tokens(hot.mean(-2), mask)
    balance = experts * jnp.sum(lax.stop_gradient(load) * mean_of_tokens(probabilities, mask))
    z = mean_of_tokens(jax.nn.logsumexp(logits, -1, keepdims=True) ** 2, mask)[0]
    return Routing(chosen, weights, load, balance, z)


def mean_of_tokens(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean of x `(..., n)` over the tokens where `mask` `(...)` is true: `(n,)`; 0 if there are none.

    >>> mean_of_tokens(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]), jnp.array([True, False, True]))
    Array([3. , 5.5], dtype=float32)
    """
    tokens = tuple(range(x.ndim - 1))
    if x.size == 0:
        return jnp.zeros_like(x, shape=x.shape[-1:])
    if mask is None:
        return x.mean(tokens)
    return jnp.sum(x, tokens, where=mask[..., None]) / jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)


def _largest(x: jax.Array, k: int) -> jax.Array:
    """`jax.lax.top_k(x, k)[1]` by k maxima. On a mesh of CPUs, the compiler would gather all of x for `top_k`."""
    found = []
    for _ in range(k):
        found.append(jnp.argmax(x, -1).astype(jnp.int32))
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == found[-1][..., None], -jnp.inf, x)
    return jnp.stack(found, -1)


def few_enough(who: str, k: int, experts: int) -> None:
    """Raise `ConfigError` unless k is an integer from 1 to the number of experts."""
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or not 1 <= k <= experts:
        raise ConfigError(f"{who}: k must be an integer from 1 to the {experts} experts, got {k!r}")


def some_capacity(capacity: Any) -> None:
    """Raise `ConfigError` unless `capacity` is None or a finite number above 0."""
    if capacity is None:
        return
    number = isinstance(capacity, numbers.Real) and not isinstance(capacity, bool)
    if not number or not 0 < float(capacity) < math.inf:
        raise ConfigError(
            f"MixtureOfExperts: capacity must be above 0, got {capacity!r}; 1.0 is a fair share for each expert, None "
            "drops no token"
        )


def slots(tokens: int, experts: int, k: int, capacity: float) -> int:
    """Largest number of tokens of a sequence for one expert: `capacity` times its fair share, rounded up, at most all.

    >>> slots(100, 8, 2, 1.25), slots(100, 8, 2, 100.0)
    (32, 100)
    """
    return min(tokens, math.ceil(tokens * k * capacity / experts))


def within_capacity(chosen: jax.Array, size: int | jax.Array) -> jax.Array:
    """True for each choice that its expert takes, when an expert takes at most `size` tokens of a sequence.

    `chosen` is `(..., length, k)`, the experts of each token; the result has the same shape. `size` is one number or
    one for each sequence, `(...)`. First choices go before second ones, and among them earlier tokens before later ones
    (Lepikhin et al. 2020, "GShard", arXiv:2006.16668). Each sequence is counted separately, so the result does not
    depend on the batch that it is in, nor on how a mesh splits the batch.

    >>> within_capacity(jnp.array([[0, 1], [1, 0], [0, 2]]), 1).tolist()
    [[True, False], [True, False], [False, True]]
    """
    if chosen.ndim < 2:
        raise InputError(f"within_capacity expects experts (..., length, k), got {describe(chosen)}")
    by_choice = chosen.swapaxes(-1, -2)
    flat = by_choice.reshape(*by_choice.shape[:-2], math.prod(by_choice.shape[-2:]))  # no -1: a batch may be empty
    place = lax.broadcasted_iota(jnp.int32, flat.shape, flat.ndim - 1)
    ids, order = lax.sort((flat, place), num_keys=1)  # stable
    start = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], -1)
    turn = place - lax.cummax(jnp.where(start, place, 0), flat.ndim - 1)
    _, turn = lax.sort((order, turn), num_keys=1)
    most = size[..., None] if jnp.ndim(size) else size  # type: ignore[index]
    return (turn < most).reshape(by_choice.shape).swapaxes(-1, -2)
