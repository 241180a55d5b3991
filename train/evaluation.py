"""Evaluation and prediction: the last batch is padded and masked, so one compiled program serves and counts exactly."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sapwood import parallel
from sapwood.core.errors import CheckError, ConfigError, DataError
from sapwood.core.run import bind, pure
from sapwood.data.batches import Batches, batches
from sapwood.data.dataset import Dataset
from sapwood.data.device import to_device
from sapwood.parallel.batches import batch_multiple
from sapwood.train import checks, metrics
from sapwood.train.forward import AUXILIARY, forward
from sapwood.train.state import TrainState

BATCH = 256
"""Examples a batch where the caller names no size: what is evaluated needs no gradient, so it may be large."""

AHEAD = 16
"""Steps that may be under way at once. More would hold their batches in memory and gain nothing."""


def evaluate_step(trainer: Any, params: dict, state: dict, batch: Any) -> dict[str, metrics.Metric]:
    """The metrics of one batch in evaluation mode, scalars weighted by the batch's mask."""
    out = forward(trainer, params, state, None, batch, train=False)
    found: dict[str, Any] = {name: metrics.as_metric(value, out.weight) for name, value in out.metrics.items()}
    return {**found, checks.FLAGS: checks.Flags(out.ok)} if out.ok else found


def auxiliary_step(trainer: Any, params: dict, state: dict, batch: Any, rows: int) -> metrics.Metric:
    """The auxiliary losses of the first `rows` examples of a batch: layers take their means and know no mask."""
    some = jax.tree.map(lambda x: x[:rows], batch)
    out = forward(of_any_rows(trainer), params, state, None, some, train=False)
    return metrics.as_metric(out.metrics[AUXILIARY], out.weight)


def of_any_rows(trainer: Any) -> Any:
    """The same trainer, whose mesh takes any number of examples: what they do not divide over is left whole, and no
    stack is cut into stages, which may have more micro-batches than there are examples."""
    if trainer.mesh is None:
        return trainer
    rules = trainer.place.rules
    whole = tuple((name, None) for name, target in rules.table if name != "batch" and "stage" in _axes(target))
    return dataclasses.replace(trainer, rules=dataclasses.replace(rules, table=whole + rules.table, strict=False))


def _axes(target: Any) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()


def predict_step(trainer: Any, params: dict, state: dict, batch: Any) -> Any:
    """The objective's prediction for one batch in evaluation mode."""
    v = bind(params, state, policy=trainer.policy, place=trainer.place, capture=False)
    return pure(trainer.objective.predict)(v, batch)[0]


def as_dataset(data: Any) -> Dataset:
    """A data set as it is, and anything else `sapwood.data.load` takes as one. Raises `DataError` for an empty one."""
    if isinstance(data, Batches):
        raise ConfigError("give the data set itself; fit, evaluate and predict make its batches")
    if not isinstance(data, Dataset):
        from sapwood.data.load import load

        data = load(data)
    if len(data) == 0:
        raise DataError("the data set is empty: there is nothing to train on, evaluate or predict")
    return data


def whole_pass(trainer: Any, data: Dataset, batch_size: int | None) -> Batches:
    """One pass over the data in its order, the last batch padded; a batch size that is not given suits the mesh."""
    if batch_size is None:
        parts = (
            1 if trainer.mesh is None else math.lcm(batch_multiple(trainer.mesh, trainer.rules), jax.process_count())
        )
        batch_size = -(-min(BATCH, len(data)) // parts) * parts
    if trainer.mesh is not None:
        parallel.check_batch_size(batch_size, trainer.batch_sharding)
    return batches(data, batch_size, shuffle=False, epochs=1, remainder="pad")


class Evaluation:
    """Evaluation over one data set, in two halves so that the device need not wait between them.

    `send` starts a pass and returns at once; `settle` fetches what it gave and computes the metrics.
    """

    def __init__(self, trainer: Any, data: Any, batch_size: int | None, what: str = "evaluation"):
        self.trainer, self.data, self.what = trainer, as_dataset(data), what
        self.batches = whole_pass(trainer, self.data, batch_size)
        self.step = trainer.compiled.evaluate

    def send(self, state: TrainState) -> list[dict[str, Any]]:
        """Start a pass with the state's parameters (their running mean, where it keeps one)."""
        params, found, batch = self.trainer.eval_params(state), [], {}
        for batch in stream(self.trainer, self.batches):
            found.append(self.step(params, state.state, batch))
            if len(found) > AHEAD:
                jax.block_until_ready(found[-AHEAD])
        if AUXILIARY in found[-1] and (rows := len(self.data) % self.batches.batch_size):
            with warnings.catch_warnings():  # what is left need not divide over a mesh
                warnings.simplefilter("ignore", parallel.ShardingWarning)
                found[-1][AUXILIARY] = self.trainer.compiled.auxiliary(params, state.state, batch, rows)
        return found

    def settle(self, found: list[dict[str, Any]], state: TrainState) -> dict[str, Any]:
        """The metrics of a pass; raises `CheckError` where a check failed in it."""
        fetched = jax.device_get(found)
        for i, tree in enumerate(fetched):
            if failed := tree.get(checks.FLAGS, checks.Flags({})).failed():
                self._explain(i, failed, state)
        return metrics.compute(metrics.merge([without_flags(tree) for tree in fetched]))

    def _explain(self, i: int, failed: list[str], state: TrainState) -> None:
        where = f"in batch {i} of the {self.what} data (examples from {i * self.batches.batch_size})"
        if jax.process_count() == 1:
            batch = self.trainer.put(self.batches[i])
            seen = state.replace(params=self.trainer.eval_params(state))
            checks.explain(self.trainer, seen, batch, None, train=False, where=where)
        raise CheckError(f"{'; '.join(failed)}, {where}")


def without_flags(tree: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a step without its check bits."""
    return {name: value for name, value in tree.items() if name != checks.FLAGS}


def stream(trainer: Any, passed: Batches) -> Iterator[dict[str, Any]]:
    """The batches of a pass from its beginning, on the devices."""
    fed = to_device(passed.seek(0), trainer.batch_sharding if trainer.mesh is not None else None)
    try:
        yield from fed
    finally:
        fed.close()


def predict(trainer: Any, state: TrainState, data: Any, batch_size: int | None) -> Any:
    """See `Trainer.predict`."""
    if not hasattr(trainer.objective, "predict"):
        raise ConfigError(
            f"the objective {trainer.objective!r} has no predict(v, batch); sw.supervised makes one that "
            f"does, or run your model with sw.apply(model, state.params, state.state, ...)"
        )
    data = as_dataset(data)
    params, parts = trainer.eval_params(state), []
    for batch in stream(trainer, whole_pass(trainer, data, batch_size)):
        parts.append(trainer.compiled.predict(params, state.state, batch))
        if len(parts) > AHEAD:  # outputs may be large, so they leave the device as they come
            parts[-AHEAD] = jax.device_get(parts[-AHEAD])
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(data)], *jax.device_get(parts))
