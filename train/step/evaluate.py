"""The steps that evaluate and predict: pure functions of parameters, state and one batch."""

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
    """The metrics of one batch in evaluation mode. Scalars count as `forward.hold` says; layers' by examples."""
    out = forward(config, params, state, None, batch, train=False)
    found: dict[str, Any] = dict(out.metrics)
    if AUXILIARY in found:
        found[AUXILIARY] = metrics.as_metric(found[AUXILIARY], examples(batch))
    if takes_mask(config.objective):
        found = {name: metrics.as_metric(value, out.weight) for name, value in found.items()}
    return {**found, checks.FLAGS: checks.Flags(out.ok)} if out.ok else found


def remainder_step(config: Config, params: dict, state: dict, batch: Any, rows: int) -> dict[str, Any]:
    """What `evaluate_step` gives for the first `rows` examples of a batch, of all that knows no mask: layers take their
    means over every example, and so may objectives that do not say otherwise."""
    some = jax.tree.map(lambda x: x[:rows], batch)
    found = evaluate_step(of_any_rows(config), params, state, some)
    return {AUXILIARY: found[AUXILIARY]} if may_pad_batches(config.objective) else found


def of_any_rows(config: Config) -> Config:
    """The same trainer, whose mesh takes any number of examples: what they do not divide over is left whole, and no
    stack is cut into stages, which may have more micro-batches than there are examples."""
    if config.mesh is None:
        return config
    rules = config.place.rules
    whole = tuple((name, None) for name, target in rules.table if name != "batch" and "stage" in _axes(target))
    return dataclasses.replace(config, rules=dataclasses.replace(rules, table=whole + rules.table, strict=False))


def _axes(target: Any) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()


def predict_step(config: Config, params: dict, state: dict, batch: Any) -> Any:
    """The objective's prediction for one batch in evaluation mode."""
    v = bind(params, state, policy=config.policy, place=config.place, capture=False)
    return pure(config.objective.predict)(v, batch)[0]
