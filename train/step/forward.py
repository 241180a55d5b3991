"""One pass through the objective: the loss with its auxiliary losses, metrics, next model state and checks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapwood import losses, metrics
from sapwood.core.bind import bind, pure
from sapwood.core.errors import ConfigError
from sapwood.core.model_output import is_array
from sapwood.core.paths import join, leaves, overlay
from sapwood.train.config import Config
from sapwood.train.objectives.supervised import takes_mask
from sapwood.train.state import trainable
from sapwood.train.step import checks

AUXILIARY = "auxiliary_loss"
"""The metric that holds what layers add to the objective's "loss"; what is minimised is the sum of the two."""


class Pass(NamedTuple):
    """What one pass gives: the total loss, what it weighs, metrics by name, the next model state, and check bits.

    The weight is that of the objective's own loss; the weight of a plain number is that of the batch's examples,
    whatever it counts: see `hold`. What layers add is a mean over the examples of the batch: see `examples`.
    """

    loss: jax.Array
    weight: Any
    metrics: dict[str, Any]
    state: dict
    ok: dict[str, Any]


def forward(
    config: Config, params: dict, state: dict, key: Any, batch: Any, *, train: bool, ordinary: Any = None
) -> Pass:
    """Run the trainer's objective on one batch.

    ``ordinary`` is what a micro-batch weighs on average. Where it is given, the objective's own loss counts in the
    total by its weight over that, and what layers add counts once, as micro-batches have the same number of examples.

    Raises `ConfigError` where the objective does not return a loss, a scalar or a `Mean`, and a dict of metrics.
    """
    frozen = trainable.frozen_scopes(params, config.trainable)
    v = bind(params, state, rng=key, train=train, policy=config.policy, place=config.place, capture=False,
             frozen=frozen)  # fmt: skip
    result, updates = pure(config.objective)(v, batch)
    loss, found = _unpack(result, config.objective)
    found.setdefault("loss", loss)
    weight = found["loss"].weight if isinstance(found["loss"], metrics.Mean) else _weight(config.objective, batch)
    loss = losses.of_mean(loss) if isinstance(loss, metrics.Mean) else loss
    if auxiliary := jax.tree.leaves(updates.losses):
        found[AUXILIARY] = sum(auxiliary[1:], auxiliary[0])
        if ordinary is not None:
            loss = jnp.where(weight == 0, 0, loss * (weight / jnp.where(ordinary == 0, 1, ordinary)))
        loss = loss + found[AUXILIARY]
    ok = checks.flat(updates.checks) if config.checks else {}
    return Pass(loss, weight, found, overlay(state, trainable.without_frozen(updates.state, frozen)), ok)


def _unpack(result: Any, objective: Any) -> tuple[jax.Array | metrics.Mean, dict[str, Any]]:
    name = _name(objective)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ConfigError(
            f"the objective {name} returned {type(result).__name__}; an objective(v, batch) returns "
            f"(loss, metrics), where metrics is a dict, {{}} if there are none"
        )
    loss, found = result
    if not isinstance(loss, metrics.Metric) and not is_array(loss):
        raise ConfigError(f"the objective {name} returned a loss of type {type(loss).__name__}; a number is expected")
    if is_array(loss) and not jnp.issubdtype(kind := jnp.result_type(loss), jnp.floating):
        raise ConfigError(f"the objective {name} returned a loss of {kind}, which has no gradient; a float is expected")
    if not isinstance(loss, metrics.Mean) and (isinstance(loss, metrics.Metric) or jnp.ndim(loss) != 0):
        got = type(loss).__name__ if isinstance(loss, metrics.Metric) else f"shape {jnp.shape(loss)}"
        raise ConfigError(
            f"the objective {name} returned a loss of {got}; it must be one number or a train.Mean: "
            f"train.Mean.of(losses), or train.Mean.of(losses, weight) under a mask or weights"
        )
    if not isinstance(found.get("loss", loss), metrics.Mean) and "loss" in found:
        raise ConfigError(
            f"the objective {name} gives a metric called 'loss', where the loss itself is logged; call it otherwise"
        )
    for metric in found:
        metrics.check_name(metric, allowed=("loss",))
    for path, value in leaves(found):
        if not isinstance(value, metrics.Metric) and jnp.ndim(value) != 0:
            raise ConfigError(
                f"the metric {join(path)!r} of the objective {name} has shape {jnp.shape(value)}; return "
                f"a scalar, or an accumulator such as train.metrics.Mean.of(values)"
            )
    return loss if isinstance(loss, metrics.Mean) else jnp.asarray(loss), dict(found)


def hold(objective: Any, found: dict[str, Any], what: str) -> None:
    """Raise `ConfigError` for plain numbers, where metrics of several batches are to be put together.

    Those of layers (`AUXILIARY`) are means over the examples of a batch by contract; those of an objective with
    ``takes_mask`` are means over what mask and weight leave.
    """
    plain = [name for name, x in found.items() if not isinstance(x, metrics.Metric) and name != AUXILIARY]
    if plain and not takes_mask(objective):
        one = "its loss" if "loss" in plain else f"the metric {plain[0]!r}"
        raise ConfigError(
            f"{what}, but the objective {_name(objective)} gives {one} as a plain number, which does not say how many "
            f"examples or tokens it is a mean of. In its place give sapwood.train.Mean.of(values), a mean over the "
            f"examples, or Mean.of(values, weight), where some count more, less or not at all"
        )


def _name(objective: Any) -> str:
    return getattr(objective, "__name__", type(objective).__name__)


def _weight(objective: Any, batch: Any) -> Any:
    """What a batch counts beside others: the sum of its mask and weights, or its number of examples."""
    weight = losses.example_weight(batch) if takes_mask(objective) else None
    if weight is None:
        return examples(batch)
    return jnp.sum(weight, dtype=jnp.float32)


def examples(batch: Any) -> jax.Array:
    """The number of examples in a batch, which is what layers take their means over."""
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])
