"""Objectives: pure functions ``objective(v, batch) -> (loss, metrics)`` that are minimized; `supervised` makes one.

``loss`` is a scalar, or a `Mean`, which also holds how much it counts. ``metrics`` is a dict of `Metric` accumulators
or scalars. A batch is a dict of arrays. The training step adds the auxiliary losses of layers (``v.loss``), so an
objective need not know of them.

**Several batches.** A scalar is the loss of its own batch. That is enough for a step, and for an evaluation in one
batch. It does not say whether 32 examples or 900 tokens were counted. So a scalar is an error where batches are
combined, in a longer evaluation or with ``accumulate``. `Mean.of(losses)` is exact in any batches, and so is
`Mean.of(losses, weight)`, where some examples count more, less or not at all:

    def objective(v, batch):
        losses = softmax_cross_entropy(model(v, batch["tokens"]), batch["next"])        # (batch, length)
        return Mean.of(losses, batch["next"] != PADDING), {}

**Masks and weights.** The objective decides what an entry of a batch means. `supervised` and `next_token` read from
"mask" and "weight", (batch,) or (batch, length), how much each example or position counts. They refuse either name for
an input or the target. An objective that does so has an attribute ``takes_mask = True``. Then evaluation pads its last
batch and masks the padding, and a scalar is a mean over what mask and weight leave. Any other objective, and
`supervised` with a metric of one's own, gets the last examples as a smaller batch.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sapwood import losses as losses_
from sapwood import metrics as metrics_
from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError, DataError
from sapwood.core.layer import describe
from sapwood.core.messages import nearest
from sapwood.core.model_output import arrays, display_name, is_array

Batch = Mapping[str, Any]
Chosen = str | Callable[..., Any]
Metrics = Chosen | Sequence[Chosen] | Mapping[str, Chosen]


class Objective(Protocol):
    """Protocol of objectives: a pure function of a cursor and a batch that returns ``(loss, metrics)``.

    An objective that also has ``predict(v, batch)`` can be used to predict.
    """

    def __call__(self, v: Any, batch: Batch, /) -> tuple[jax.Array | metrics_.Mean, dict[str, Any]]: ...


def takes_mask(objective: Any) -> bool:
    """Return True if the objective reads from the entries "mask" and "weight" of a batch how much an example counts.

    To any other objective these entries have no special meaning.
    """
    return getattr(objective, "takes_mask", False)


def may_pad_batches(objective: Any) -> bool:
    """Return True if evaluation may pad a batch and mask the padding: the loss and all metrics then leave it out.

    It may not if `supervised` has a metric of one's own. Such a metric need not look at its weight, and if it returns
    sums of its own they would count the padding.

    >>> own = lambda outputs, target, weight: metrics_.Mean.of(outputs[:, 0] > target)
    >>> [may_pad_batches(supervised(len, metrics=metric)) for metric in ("accuracy", own)]
    [True, False]
    """
    return takes_mask(objective) and not (
        isinstance(objective, Supervised) and any(metrics_.kind(metric) is None for _, metric in objective.metrics)
    )


COUNTS = {"mask": "which examples or positions count", "weight": "how much an example counts"}
"""Entries that objectives with ``takes_mask`` read, and what each one says; the texts are part of messages."""


def check_names(what: str, inputs: Sequence[str], target: str) -> None:
    """Raise `ConfigError` if an input or the target is called "mask" or "weight".

    >>> check_names("supervised", ("image",), "mask")
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: supervised(target='mask'): an entry "mask" says which examples or positions count \
in the loss, so it cannot be the target too. If it is the target, give it another name, as in \
data.map(lambda e: {"image": e["image"], "masks": e["mask"]}); if it says what counts, the target is another entry
    """
    for name in (*inputs, target):
        if name in COUNTS:
            role, one = ("target", "the target") if name == target else ("inputs", "an input")
            others = ", ".join(f'"{x}": e["{x}"]' for x in (*inputs, target) if x not in COUNTS)
            raise ConfigError(
                f'{what}({role}={name!r}): an entry "{name}" says {COUNTS[name]} in the loss, so it cannot be {one} '
                f"too. If it is {one}, give it another name, as in data.map(lambda e: "
                f'{{{others}, "{name}s": e["{name}"]}}); if it says what counts, {one} is another entry'
            )


@dataclasses.dataclass(frozen=True)
class Supervised:
    """The objective that `supervised` makes: loss and metrics of ``model(v, *inputs)`` against ``batch[target]``.

    Attributes:
        model: a function ``model(v, *inputs)``.
        loss: a function ``(outputs, target)`` that returns a loss for each example.
        metrics: pairs of a name and a function ``(outputs, target, weight)``.
        inputs: names of the entries that the model takes.
        target: name of the entry with the target.
    """

    takes_mask = True

    model: Callable[..., Any]
    loss: losses_.Loss
    metrics: tuple[tuple[str, Callable[..., Any]], ...]
    inputs: tuple[str, ...]
    target: str

    def predict(self, v: Any, batch: Batch) -> Any:
        """Return the model's outputs for a batch, whose inputs are cast to the compute dtype."""
        return self._outputs(v, batch, None)

    def _outputs(self, v: Any, batch: Batch, weight: jax.Array | None) -> Any:
        """Return the model's outputs. A model that takes a ``mask`` gets the rows that count by ``weight``."""
        inputs = [v.policy.cast(_feature(batch, name, "inputs")) for name in self.inputs]
        told = {}
        if weight is not None and _takes_mask(self.model, len(inputs)):
            told["mask"] = _rows_of(self.model, weight, inputs[0])
        outputs = self.model(v, *inputs, **told)
        if outputs is None:
            raise ConfigError(f"{display_name(self.model)} returned None; does it `return` what it computes?")
        return arrays(self.model, outputs)

    def __call__(self, v: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        weight = losses_.example_weight(batch)
        outputs, target = self._outputs(v, batch, weight), _feature(batch, self.target, "target")
        if not is_array(outputs) and self.loss in losses_.LOSSES.values():
            raise ConfigError(
                f"{display_name(self.model)} returned a {type(outputs).__name__} of {describe(outputs)}; the loss "
                f"{display_name(self.loss)} takes one array. Return that one, or give a loss(outputs, target) of your "
                "own"
            )
        kinds = {kind for _, metric in self.metrics if (kind := metrics_.kind(metric))}
        losses_.check(v, self.loss, outputs, target, weight, kinds)
        loss, mean = losses_.reduce(self._per_example(*losses_.contained((outputs, target), weight)), weight)
        metrics = {name: _as_accumulator(name, metric(outputs, target, weight), target, weight)
                   for name, metric in self.metrics}  # fmt: skip
        if weight is None:  # all examples count the same, so the loss is enough
            return loss, metrics
        return loss, {"loss": mean, **metrics}

    def _per_example(self, outputs: Any, target: Any) -> jax.Array:
        """Return the loss of each example, (batch, ...), or raise `ConfigError` for another shape."""
        losses = self.loss(outputs, target)
        if not is_array(losses):
            raise ConfigError(
                f"the loss {display_name(self.loss)} returned {losses!r}; one loss per example is expected"
            )
        if losses.ndim == 0 or losses.shape[0] != target.shape[0]:
            name = getattr(self.loss, "__name__", repr(self.loss))
            raise ConfigError(
                f"the loss {name} returned shape {losses.shape} for {target.shape[0]} examples; return "
                f"one loss per example (batch, ...), the mean is taken under the mask and weights"
            )
        return losses


def _takes_mask(model: Any, inputs: int) -> bool:
    """Return True if a model has an argument ``mask`` besides the cursor and its inputs."""
    try:
        names = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):
        return False
    rest = [p for i, p in enumerate(names) if i > inputs or p.kind is p.KEYWORD_ONLY]
    return any(p.name == "mask" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in rest)


def _rows_of(model: Any, weight: jax.Array, x: jax.Array) -> jax.Array:
    """Return the rows that count: bool (batch, length) if the input ``x`` is a sequence, else (batch,)."""
    sequences = x.ndim == 3 or (x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer))
    return counted_rows(model, weight, x.shape[:2] if sequences else x.shape[:1])


def counted_rows(model: Any, weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return which rows count in at least one position: bool of ``shape``, (batch,) or (batch, length).

    A model with ``mask_of_rows = True`` always gets (batch,): it takes both shapes, and this one costs it less.

    >>> counted_rows(None, jnp.array([[0, 2], [0, 0]]), (2, 3)).tolist()
    [[True, True, True], [False, False, False]]
    """
    weight = jnp.asarray(weight)
    rows = jnp.any(weight.astype(bool), tuple(range(1, weight.ndim)))
    if getattr(model, "mask_of_rows", False):
        return rows
    return jnp.broadcast_to(rows.reshape(rows.shape + (1,) * (len(shape) - 1)), shape)


def _as_accumulator(name: str, value: Any, target: Any, weight: Any) -> metrics_.Metric:
    """Convert what a metric function returned to an accumulator.

    It is an accumulator already, or one value for each example, of which the mean is taken.
    """
    if isinstance(value, metrics_.Metric):
        return value
    if not hasattr(value, "astype") or value.ndim == 0 or value.shape[0] != target.shape[0]:
        raise ConfigError(
            f"the metric {name!r} returned {describe(value)} for {target.shape[0]} examples; return one value per "
            f"example (batch, ...), of which the mean is taken under the mask and weights, or a train.metrics.Metric"
        )
    return metrics_.Mean.of(value, weight)


def _feature(batch: Batch, name: str, role: str) -> Any:
    """Return an entry of a batch, or raise `DataError` with the nearest names."""
    if name not in batch:
        raise DataError(
            f"the batch has no feature {name!r}, which supervised({role}=...) names"
            f"{nearest(name, batch)} (it has {', '.join(batch) or 'nothing'})"
        )
    return batch[name]


@migration_hints.answering("supervised", migration_hints.SUPERVISED)
def supervised(
    model: Callable[..., Any],
    loss: str | losses_.Loss = "softmax_cross_entropy",
    metrics: Metrics | None = None,
    inputs: str | Sequence[str] = "image",
    target: str = "label",
) -> Supervised:
    """Make the objective of learning ``target`` from ``inputs`` by example.

    If a batch has entries "mask" or "weight", they say how much each example counts in the loss and the metrics. The
    model still sees every row, and so do its batch statistics and mixtures of experts. A model with an argument
    ``mask`` besides its inputs is told there which rows count, if the batch says what counts. That mask is bool (batch,
    length) if the first input is a sequence, which is integers (batch, length) or an array (batch, length, features);
    else it is bool (batch,). `BatchNorm` and `MixtureOfExperts` take such a mask. `next_token` does the same.

    The target of an example that does not count may be missing: NaN, or a label such as -1. But `fit` checks every row
    of data that is declared to be finite or to have classes, and NaN among the inputs reaches the gradient.

    The loss says what the outputs are: logits of classes, logits of independent "binary labels", or numbers. A metric
    that takes the outputs for something else is refused. A target that the loss or a metric would misread, such as a
    label outside the classes, is found on the device. docs/metrics.md lists all losses and metrics.

    Args:
        model: any model, a function ``model(v, *inputs)``.
        loss: a name, or a function ``(outputs, target) -> per-example losses``.
        metrics: names or functions ``(outputs, target, weight) -> Metric`` (or one value per example), or a dict of
            them by the name that each has in a row. None takes the metric that goes with the loss: "accuracy",
            "binary_accuracy" or "mean_absolute_error", and no metric for a loss of one's own.
        inputs: name of the entry that the model takes, or the names of several.
        target: name of the entry to learn.

    Raises:
        ConfigError: a loss or metric is unknown (the message has the nearest names), a metric does not fit the loss, a
            name is given to two metrics or taken by a column of `fit`, or an input or the target is called "mask" or
            "weight".
        DataError: when called, if the batch lacks a feature, or shapes do not fit.

    >>> import jax.numpy as jnp
    >>> import sapwood as sw
    >>> objective = supervised(lambda v, x: x @ v.param("w", (2, 3), jax.nn.initializers.zeros), inputs="features")
    >>> batch = {"features": jnp.ones((4, 2)), "label": jnp.array([0, 1, 2, 0])}
    >>> params, state = sw.init(objective, 0, batch)
    >>> (loss, metrics), _ = sw.apply(objective, params, state, batch)
    >>> round(float(loss), 4), metrics_.compute(metrics)["accuracy"]
    (1.0986, 0.5)
    """
    if not callable(model):
        raise ConfigError(f"supervised(model=...): a model is a function f(v, *inputs), got {type(model).__name__}")
    if isinstance(model, type):
        raise ConfigError(f"supervised(model=...): {model.__name__} is a class; a model is {model.__name__}(...)")
    if isinstance(loss, Mapping | list | tuple):
        raise ConfigError(
            f"supervised(loss={loss!r}): one loss is expected. For several outputs write the objective yourself, a "
            "function (v, batch) -> (the sum of the losses, metrics), which sw.Trainer takes in its place"
        )
    if not isinstance(target, str):
        raise ConfigError(
            f"supervised(target={target!r}): the name of one entry is expected. For several write the objective "
            "yourself, a function (v, batch) -> (the sum of the losses, metrics), which sw.Trainer takes in its place"
        )
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    check_names("supervised", names, target)
    loss = losses_.resolve(loss)
    kind = losses_.kind(loss)
    chosen = metrics_.resolve_all(metrics_.default(kind) if metrics is None else metrics)
    for name, metric in chosen:
        _check_kind(name, metric, loss, kind)
    return Supervised(model, loss, chosen, names, target)


def _check_kind(name: str, metric: Callable[..., Any], loss: losses_.Loss, kind: str | None) -> None:
    """Raise `ConfigError` if a metric takes the outputs for something else than the loss does."""
    other = metrics_.kind(metric)
    if kind is not None and other is not None and kind != other:
        raise ConfigError(
            f"supervised: the metric {name!r} is of {other}, but the loss {metrics_.plain(loss).__name__} takes the "
            f"outputs for {kind}; metrics of {kind} are "
            f"{', '.join(repr(each.__name__) for each in metrics_.KINDS[kind])}, and a function (outputs, target, "
            f"weight) of your own may take them for anything"
        )
