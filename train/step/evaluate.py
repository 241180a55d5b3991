"""The steps that evaluate and predict: pure functions of parameters, model state and one batch.

`evaluate_step` serves batches of the full size. `remainder_step` serves the last, smaller batch of a pass, for what
padding would change. These steps have no random key.
"""

import dataclasses
from typing import Any

import jax

from sapwood import metrics
from sapwood.core.bind import bind, pure
from sapwood.train.config import Config
from sapwood.train.objectives.supervised import may_pad_batches, takes_mask
from sapwood.train.step import checks
from sapwood.train.step.forward import AUXILIARY, examples, forward


def evaluate_step(config: Config, params: dict, state: dict, batch: Any) -> dict[str, metrics.Metric]:
    """Compute the metrics of one batch in evaluation mode.

    The losses that layers add become a `Mean` weighted by the number of examples. Scalars of an objective with
    ``takes_mask`` become a `Mean` weighted by mask and weights. Scalars of any other objective stay scalars, which
    `forward.hold` rejects if several batches are merged.

    Returns:
        The metrics by name, with `Flags` under "checks" if the model has checks.
    """
    out = forward(config, params, state, None, batch, train=False)
    found: dict[str, Any] = dict(out.metrics)
    if AUXILIARY in found:
        found[AUXILIARY] = metrics.as_metric(found[AUXILIARY], examples(batch))
    if takes_mask(config.objective):
        found = {name: metrics.as_metric(value, out.weight) for name, value in found.items()}
    return {**found, checks.FLAGS: checks.Flags(out.ok)} if out.ok else found


def remainder_step(config: Config, params: dict, state: dict, batch: Any, rows: int) -> dict[str, Any]:
    """Compute, for the first `rows` examples of a batch, the metrics that padding would change.

    If the objective masks the padding (`fills`), these are only the losses that layers add, which are means over every
    row. For any other objective these are all metrics of `evaluate_step`.
    """
    some = jax.tree.map(lambda x: x[:rows], batch)
    found = evaluate_step(of_any_rows(config), params, state, some)
    return {AUXILIARY: found[AUXILIARY]} if may_pad_batches(config.objective) else found


def of_any_rows(config: Config) -> Config:
    """Return a copy of the config for batches of any size.

    A batch that does not divide over the mesh is replicated. Pipelining is off, because a pipeline may have more
    micro-batches than there are examples.
    """
    if config.mesh is None:
        return config
    rules = config.place.rules
    whole = tuple((name, None) for name, target in rules.table if name != "batch" and "stage" in _axes(target))
    return dataclasses.replace(config, rules=dataclasses.replace(rules, table=whole + rules.table, strict=False))


def _axes(target: Any) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()


def predict_step(config: Config, params: dict, state: dict, batch: Any) -> Any:
    """Compute the objective's prediction for one batch in evaluation mode."""
    v = bind(params, state, policy=config.policy, place=config.place, capture=False)
    return pure(config.objective.predict)(v, batch)[0]
