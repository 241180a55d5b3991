"""Evaluation and prediction of a whole data set, exact for any batch size.

The last batch is padded, so that all batches have one shape and one compiled program. If the objective leaves out the
padding by its mask (`objectives.supervised.fills`), the padded batch is exact. For any other objective, a second
program (`Programs.remainder`) computes the last batch from its real examples only. The same program computes the losses
that layers add for the last batch, since layers average over every row. `Evaluation` has two halves, so that training
goes on while the device evaluates.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sapwood import metrics, parallel
from sapwood.core.errors import CheckError, ConfigError, DataError
from sapwood.data.batching import Batches, batches
from sapwood.data.dataset import Dataset
from sapwood.data.device_feed import to_device
from sapwood.parallel.batches import batch_multiple
from sapwood.train.config import Config
from sapwood.train.loop.programs import Programs
from sapwood.train.objectives.supervised import may_pad_batches
from sapwood.train.state.ema import eval_variables
from sapwood.train.state.train_state import TrainState
from sapwood.train.step import checks
from sapwood.train.step.forward import AUXILIARY, hold

BATCH = 256
"""Default number of examples in a batch. It is large, because evaluation keeps nothing for a gradient."""

AHEAD = 16
"""Largest number of steps under way on the device. More would hold their batches in memory and gain nothing."""


def as_dataset(data: Any, learned: Any = None, what: str = "data") -> Dataset:
    """Return data as a `Dataset`, converted to the features of the training data.

    Args:
        data: a `Dataset`, or anything that `sapwood.data.load` takes.
        learned: the features of the training data, such as `TrainState.features`; None converts nothing.
        what: name of the data, for messages.

    Raises:
        ConfigError: ``data`` is a `Batches`.
        DataError: the data set is empty, or cannot be converted to ``learned``.
    """
    if isinstance(data, Batches):
        raise ConfigError("give the data set itself; fit, evaluate and predict make its batches")
    if not isinstance(data, Dataset):
        from sapwood.data.loading import load

        data = load(data)
    if len(data) == 0:
        raise DataError("the data set is empty: there is nothing to train on, evaluate or predict")
    try:
        return data if learned is None else data.held_to(learned)
    except DataError as error:
        error.add_note(
            f"in the {what}; state.features is what training learned, and state.replace(features=None) forgets it"
        )
        raise


def few_sizes(examples: int) -> int:
    """Return the batch size for a prediction of so many examples: the largest power of four that they fill, or `BATCH`.

    So five compiled programs serve any number of examples, and there are always fewer padded rows than examples.

    >>> [few_sizes(n) for n in (1, 3, 4, 20, 64, 100, 255, 256, 10000)]
    [1, 1, 4, 16, 64, 64, 64, 256, 256]
    """
    return min(BATCH, 4 ** ((examples.bit_length() - 1) // 2))


def whole_pass(config: Config, data: Dataset, batch_size: int | None, largest: int = BATCH) -> Batches:
    """Return the batches of one pass over the data, in its order. The last batch is padded.

    Args:
        config: the config, whose mesh must divide the batch.
        data: the data set.
        batch_size: examples of a batch. None takes the number of examples, at most ``largest``, rounded up to a
            multiple that divides over the mesh and the processes.
        largest: upper limit of that choice.

    Raises:
        ConfigError: ``batch_size`` does not divide over the mesh.
    """
    if batch_size is None:
        parts = 1 if config.mesh is None else math.lcm(batch_multiple(config.mesh, config.rules), jax.process_count())
        batch_size = -(-min(largest, len(data)) // parts) * parts
    if config.mesh is not None:
        parallel.check_batch_size(batch_size, config.batch_sharding)
    return batches(data, batch_size, shuffle=False, epochs=1, remainder="pad")


class Evaluation:
    """Evaluation over one data set, in two halves, so that the device can go on with other work between them.

    `send` starts a pass and returns before it is done. `settle` fetches its results and computes the metrics.

    Args:
        config: the config.
        programs: its compiled programs.
        data: the data, converted by `as_dataset`.
        batch_size: examples of a batch; None chooses a size (`whole_pass`).
        what: name of the data, for messages.
        learned: the features of the training data, or None.

    Attributes:
        batches: the batches of a pass.
        step: the program ``(params, state, batch) -> metrics``.
    """

    def __init__(
        self, config: Config, programs: Programs, data: Any, batch_size: int | None, what: str = "evaluation",
        learned: Any = None,
    ):  # fmt: skip
        self.config, self.programs, self.data, self.what = (
            config,
            programs,
            as_dataset(data, learned, f"{what} data"),
            what,
        )
        self.batches = whole_pass(config, self.data, batch_size)
        self.step = self.programs.evaluate

    def send(self, state: TrainState) -> list[dict[str, Any]]:
        """Start a pass with the state's parameters, or with their running means if it keeps some.

        Returns the metrics of each batch, with `Flags` of its checks, on the device.
        """
        (params, model_state), found = eval_variables(state), []
        masked, rows = may_pad_batches(self.config.objective), len(self.data) % self.batches.batch_size
        for i, batch in enumerate(stream(self.config, self.batches)):
            last = rows and i == self.batches.steps_per_epoch - 1
            if masked or not last:
                found.append(self.step(params, model_state, batch))
                self.check(found[-1])
            if last and (not masked or AUXILIARY in found[-1]):
                with warnings.catch_warnings():  # the remaining rows need not divide over the mesh
                    warnings.simplefilter("ignore", parallel.ShardingWarning)
                    more = self.programs.remainder(params, model_state, batch, rows)
                found[i:] = [{**found[i], **more} if masked else more]
            if len(found) > AHEAD:
                jax.block_until_ready(found[-AHEAD])
        return found

    def check(self, found: dict[str, Any]) -> None:
        """Raise `ConfigError` if the metrics of a batch cannot be merged with those of other batches.

        Only the types and names in ``found`` count, not its numbers. One batch is never an error.
        """
        if self.batches.steps_per_epoch > 1:
            n, size = len(self.data), self.batches.batch_size
            what = f"evaluating {n} examples in batches of {size} puts their metrics together (batch_size={n} does not)"
            hold(self.config.objective, without_flags(found), what)

    def settle(self, found: list[dict[str, Any]], state: TrainState) -> dict[str, Any]:
        """Fetch the results of `send` and compute the metrics of the pass. Raises `CheckError` if a check failed."""
        fetched = jax.device_get(found)
        for i, tree in enumerate(fetched):
            if failed := tree.get(checks.FLAGS, checks.Flags({})).failed():
                self._explain(i, failed, state)
        return metrics.compute(metrics.merge([without_flags(tree) for tree in fetched]))

    def _explain(self, i: int, failed: list[str], state: TrainState) -> None:
        where = f"in batch {i} of the {self.what} data (examples from {i * self.batches.batch_size})"
        if jax.process_count() == 1:
            batch = self.config.put(as_given(self.config, self.batches, self.batches[i]))
            params, model_state = eval_variables(state)
            seen = state.replace(params=params, state=model_state)
            examples, dataset = self.batches.indices(i), self.batches.dataset
            name = lambda row: dataset.where(int(examples[row]))  # noqa: E731
            checks.explain(self.config, seen, batch, None, train=False, where=where, name=name)
        raise CheckError(f"{'; '.join(failed)}, {where}")


def without_flags(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a step without the bits of its checks."""
    return {name: value for name, value in tree.items() if name != checks.FLAGS}


def stream(config: Config, passed: Batches) -> Iterator[dict[str, Any]]:
    """Yield the batches of a pass from its beginning, on the devices."""
    fed = to_device(passed.seek(0), config.batch_sharding if config.mesh is not None else None)
    try:
        for batch in fed:
            yield as_given(config, passed, batch)
    finally:
        fed.close()


def as_given(config: Config, passed: Batches, batch: dict[str, Any]) -> dict[str, Any]:
    """Remove the mask of the padding from a batch. The mask stays if the objective uses it (`fills`), or if the data
    have an entry "mask" of their own."""
    if may_pad_batches(config.objective) or "mask" in passed.dataset.features:
        return batch
    return {name: x for name, x in batch.items() if name != "mask"}


def predict(config: Config, programs: Programs, state: TrainState, data: Any, batch_size: int | None) -> Any:
    """Compute the outputs for every example; see `Trainer.predict`."""
    if not hasattr(config.objective, "predict"):
        raise ConfigError(
            f"the objective {config.objective!r} has no predict(v, batch); sw.supervised makes one that "
            f"does, or run your model with sw.apply(model, state.params, state.state, ...)"
        )
    inputs, learned = getattr(config.objective, "inputs", None), state.features or {}
    learned = {name: feature for name, feature in learned.items() if inputs is None or name in inputs}
    data = as_dataset(data, learned, "data to predict")
    (params, model_state), parts, step = eval_variables(state), [], programs.predict
    for batch in stream(config, whole_pass(config, data, batch_size, few_sizes(len(data)))):
        parts.append(step(params, model_state, batch))
        if len(parts) > AHEAD:  # outputs may be large, so old ones leave the device early
            parts[-AHEAD] = jax.device_get(parts[-AHEAD])
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(data)], *jax.device_get(parts))
