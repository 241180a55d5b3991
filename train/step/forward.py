"""`forward`: one pass through the objective. It gives total loss, metrics, next model state and checks.

The training step differentiates it; evaluation calls it as it is. The objective's result is checked here (`_unpack`),
while it is traced. `hold` rejects scalars where metrics of several batches are combined.
"""

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
"""Name of the metric with the losses that layers add. The total that is minimized is the objective's "loss" plus it."""


class Pass(NamedTuple):
    """The results of one pass.

    Attributes:
        loss: the total loss, a scalar: that of the objective plus those of layers.
        weight: what the objective's own loss counts, a scalar. For a `Mean` it is ``Mean.weight``. For a plain number
            it is the sum of mask and weights, or the number of examples, even if the number counts something else;
            see `hold`. Losses of layers are means over the examples of the batch (`examples`).
        metrics: the metrics by name.
        state: the next model state.
        ok: dict from the message of a check to a boolean scalar; empty without checks.
    """

    loss: jax.Array
    weight: Any
    metrics: dict[str, Any]
    state: dict
    ok: dict[str, Any]


def forward(
    config: Config, params: dict, state: dict, key: Any, batch: Any, *, train: bool, ordinary: Any = None
) -> Pass:
    """Run the objective of the config on one batch.

    Args:
        config: the config.
        params: all parameters.
        state: the model state.
        key: the random key of the step; None in evaluation.
        batch: a dict of arrays ``(batch, ...)``.
        train: True in training.
        ordinary: the mean weight of the micro-batches of a batch, or None. If layers add losses, the objective's own
            loss is multiplied by its weight over ``ordinary``. Losses of layers are not, because all micro-batches have
            the same number of examples.

    Raises:
        ConfigError: the objective does not return a loss, which is a scalar or a `Mean`, and a dict of metrics.
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
    """Check what an objective returned. Return its loss, and a copy of its dict of metrics."""
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
    """Raise `ConfigError` for metrics that are plain numbers, since these cannot be combined over several batches.

    Two kinds of numbers are allowed. The losses of layers (`AUXILIARY`) are means over the examples of a batch by
    contract. The numbers of an objective with ``takes_mask`` are means over what mask and weight leave.

    Args:
        objective: the objective.
        found: its metrics by name.
        what: the beginning of the message, which says why batches are combined.
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
    """Return the weight of a batch among others: the sum of its mask and weights, or its number of examples."""
    weight = losses.example_weight(batch) if takes_mask(objective) else None
    if weight is None:
        return examples(batch)
    return jnp.sum(weight, dtype=jnp.float32)


def examples(batch: Any) -> jax.Array:
    """Return the number of examples in a batch as float32. The losses of layers are means over these examples."""
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])
