"""One pass through the objective: the loss with its auxiliary losses, metrics, next model state and checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapwood.core.errors import ConfigError
from sapwood.core.paths import join, leaves, overlay
from sapwood.core.run import bind, pure
from sapwood.train import checks, losses, metrics, trainable

AUXILIARY = "auxiliary_loss"
"""The metric that holds what layers add to the objective's "loss"; what is minimised is the sum of the two."""


class Pass(NamedTuple):
    """What one pass gives: the total loss, what it weighs, metrics by name, the next model state, and check bits."""

    loss: jax.Array
    weight: Any
    metrics: dict[str, Any]
    state: dict
    ok: dict[str, Any]


def forward(trainer: Any, params: dict, state: dict, key: Any, batch: Any, *, train: bool) -> Pass:
    """Run the trainer's objective on one batch.

    Raises `ConfigError` where the objective does not return a scalar loss and a dict of metrics.
    """
    frozen = trainable.frozen(params, trainer.trainable)
    v = bind(params, state, rng=key, train=train, policy=trainer.policy, place=trainer.place, capture=False,
             frozen=frozen)  # fmt: skip
    result, updates = pure(trainer.objective)(v, batch)
    loss, found = _unpack(result, trainer.objective)
    found.setdefault("loss", loss)
    weight = found["loss"].weight if isinstance(found["loss"], metrics.Mean) else _weight(batch)
    if auxiliary := jax.tree.leaves(updates.losses):
        found[AUXILIARY] = sum(auxiliary[1:], auxiliary[0])
        loss = loss + found[AUXILIARY]
    ok = checks.flat(updates.checks) if trainer.checks else {}
    return Pass(loss, weight, found, overlay(state, trainable.unfrozen(updates.state, frozen)), ok)


def _unpack(result: Any, objective: Any) -> tuple[jax.Array, dict[str, Any]]:
    name = getattr(objective, "__name__", type(objective).__name__)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ConfigError(
            f"the objective {name} returned {type(result).__name__}; an objective(v, batch) returns "
            f"(loss, metrics), where metrics is a dict, {{}} if there are none"
        )
    loss, found = result
    if jnp.ndim(loss) != 0:
        raise ConfigError(
            f"the objective {name} returned a loss of shape {jnp.shape(loss)}; it must be one number: "
            f"take the mean over the batch (train.losses.reduce does it under a mask)"
        )
    for path, value in leaves(found):
        if not isinstance(value, metrics.Metric) and jnp.ndim(value) != 0:
            raise ConfigError(
                f"the metric {join(path)!r} of the objective {name} has shape {jnp.shape(value)}; return "
                f"a scalar, or an accumulator such as train.metrics.Mean.of(values)"
            )
    return jnp.asarray(loss), dict(found)


def _weight(batch: Any) -> Any:
    """What a batch counts beside others: the sum of its mask and weights, or its number of examples."""
    weight = losses.example_weight(batch)
    if weight is None:
        return jnp.float32(jax.tree.leaves(batch)[0].shape[0])
    return jnp.sum(weight, dtype=jnp.float32)
