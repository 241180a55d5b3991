"""Objectives: what is minimised. Any pure function ``objective(v, batch) -> (loss, metrics)``; `supervised` makes one.

``loss`` is a scalar, or a `Mean`, which says what it counts too; ``metrics`` is a dict of `Metric` accumulators or
scalars. A batch is a dict of arrays. Auxiliary losses of layers (``v.loss``) are added by the training step, so an
objective need not know of them.

**What several batches give together.** A scalar is the loss of its own batch: enough for a step, and for an evaluation
in one batch. It does not say whether 32 examples or 900 tokens were counted, so where batches are put together (a
longer evaluation, ``accumulate``) it is an error. `Mean.of(losses)`, or `Mean.of(losses, weight)` where some count
more, less or not at all, is exact in any batches:

    def objective(v, batch):
        losses = softmax_cross_entropy(model(v, batch["tokens"]), batch["next"])        # (batch, length)
        return Mean.of(losses, batch["next"] != PADDING), {}

**Masks and weights.** An entry of a batch means what the objective makes of it. Those of `supervised` and `next_token`
take "mask" and "weight", (batch,) or (batch, length), for what each example or position counts; they refuse either as
an input or a target. An attribute ``takes_mask = True`` says so of an objective: evaluation fills its last batch up and
masks what fills it, and a scalar is a mean over what mask and weight leave. Any other objective, and `supervised` with
a metric of one's own, is given the last examples alone, as a smaller batch.
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
from sapwood.core.model_output import arrays, is_array, named

Batch = Mapping[str, Any]
Chosen = str | Callable[..., Any]
Metrics = Chosen | Sequence[Chosen] | Mapping[str, Chosen]


class Objective(Protocol):
    """A pure function of a cursor and a batch: ``(loss, metrics)``. One with ``predict(v, batch)`` can predict too."""

    def __call__(self, v: Any, batch: Batch, /) -> tuple[jax.Array | metrics_.Mean, dict[str, Any]]: ...


def takes_mask(objective: Any) -> bool:
    """Whether the objective counts by the entries "mask" and "weight" of a batch. To any other they mean nothing."""
    return getattr(objective, "takes_mask", False)


def fills(objective: Any) -> bool:
    """Whether evaluation may fill a batch up and mask what fills it: the loss and all metrics then leave that out.

    A metric of one's own need not look at its weight, and one that gives sums of its own would count what fills it.

    >>> own = lambda outputs, target, weight: metrics_.Mean.of(outputs[:, 0] > target)
    >>> [fills(supervised(len, metrics=metric)) for metric in ("accuracy", own)]
    [True, False]
    """
    return takes_mask(objective) and not (
        isinstance(objective, Supervised) and any(metrics_.kind(metric) is None for _, metric in objective.metrics)
    )


COUNTS = {"mask": "which examples or positions count", "weight": "how much an example counts"}
"""The entries that objectives with ``takes_mask`` count by, and what they say."""


def check_names(what: str, inputs: Sequence[str], target: str) -> None:
    """Raise `ConfigError` where an input or the target has the name of what says how much an example counts.

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
    """The objective `supervised` makes: ``loss`` and ``metrics`` of ``model(v, *inputs)`` against ``batch[target]``."""

    takes_mask = True

    model: Callable[..., Any]
    loss: losses_.Loss
    metrics: tuple[tuple[str, Callable[..., Any]], ...]
    inputs: tuple[str, ...]
    target: str

    def predict(self, v: Any, batch: Batch) -> Any:
        """The model's outputs for the inputs of a batch, which are cast to the compute dtype."""
        return self._outputs(v, batch, None)

    def _outputs(self, v: Any, batch: Batch, weight: jax.Array | None) -> Any:
        """The model's outputs; a model that takes a ``mask`` is told the rows of which nothing counts."""
        inputs = [v.policy.cast(_feature(batch, name, "inputs")) for name in self.inputs]
        told = {}
        if weight is not None and _takes_mask(self.model, len(inputs)):
            told["mask"] = _rows_of(self.model, weight, inputs[0])
        outputs = self.model(v, *inputs, **told)
        if outputs is None:
            raise ConfigError(f"{named(self.model)} returned None; does it `return` what it computes?")
        return arrays(self.model, outputs)

    def __call__(self, v: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        weight = losses_.example_weight(batch)
        outputs, target = self._outputs(v, batch, weight), _feature(batch, self.target, "target")
        if not is_array(outputs) and self.loss in losses_.LOSSES.values():
            raise ConfigError(
                f"{named(self.model)} returned a {type(outputs).__name__} of {describe(outputs)}; the loss "
                f"{named(self.loss)} takes one array. Return that one, or give a loss(outputs, target) of your own"
            )
        kinds = {kind for _, metric in self.metrics if (kind := metrics_.kind(metric))}
        losses_.check(v, self.loss, outputs, target, weight, kinds)
        loss, mean = losses_.reduce(self._per_example(*losses_.contained((outputs, target), weight)), weight)
        metrics = {name: _as_accumulator(name, metric(outputs, target, weight), target, weight)
                   for name, metric in self.metrics}  # fmt: skip
        if weight is None:  # the loss says it all: every example counts the same
            return loss, metrics
        return loss, {"loss": mean, **metrics}

    def _per_example(self, outputs: Any, target: Any) -> jax.Array:
        losses = self.loss(outputs, target)
        if not is_array(losses):
            raise ConfigError(f"the loss {named(self.loss)} returned {losses!r}; one loss per example is expected")
        if losses.ndim == 0 or losses.shape[0] != target.shape[0]:
            name = getattr(self.loss, "__name__", repr(self.loss))
            raise ConfigError(
                f"the loss {name} returned shape {losses.shape} for {target.shape[0]} examples; return "
                f"one loss per example (batch, ...), the mean is taken under the mask and weights"
            )
        return losses


def _takes_mask(model: Any, inputs: int) -> bool:
    """Whether a model has a ``mask`` besides the cursor and its inputs."""
    try:
        names = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):
        return False
    rest = [p for i, p in enumerate(names) if i > inputs or p.kind is p.KEYWORD_ONLY]
    return any(p.name == "mask" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in rest)


def _rows_of(model: Any, weight: jax.Array, x: jax.Array) -> jax.Array:
    sequences = x.ndim == 3 or (x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer))
    return counted_rows(model, weight, x.shape[:2] if sequences else x.shape[:1])


def counted_rows(model: Any, weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which rows count at all: bool of ``shape``, (batch,) or (batch, length).

    A model with ``mask_of_rows = True`` is always given (batch,): it takes both, and this one costs it less.

    >>> counted_rows(None, jnp.array([[0, 2], [0, 0]]), (2, 3)).tolist()
    [[True, True, True], [False, False, False]]
    """
    weight = jnp.asarray(weight)
    rows = jnp.any(weight.astype(bool), tuple(range(1, weight.ndim)))
    if getattr(model, "mask_of_rows", False):
        return rows
    return jnp.broadcast_to(rows.reshape(rows.shape + (1,) * (len(shape) - 1)), shape)


def _as_accumulator(name: str, value: Any, target: Any, weight: Any) -> metrics_.Metric:
    """A metric function may hand back an accumulator, or one value per example to be averaged."""
    if isinstance(value, metrics_.Metric):
        return value
    if not hasattr(value, "astype") or value.ndim == 0 or value.shape[0] != target.shape[0]:
        raise ConfigError(
            f"the metric {name!r} returned {describe(value)} for {target.shape[0]} examples; return one value per "
            f"example (batch, ...), of which the mean is taken under the mask and weights, or a train.metrics.Metric"
        )
    return metrics_.Mean.of(value, weight)


def _feature(batch: Batch, name: str, role: str) -> Any:
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
    """The objective of learning ``target`` from ``inputs`` by example.

    ``model(v, *inputs)`` is any model. ``loss`` is a name or a function ``(outputs, target) -> per-example losses``;
    ``metrics`` are names or functions ``(outputs, target, weight) -> Metric`` (or one value per example), or a dict of
    them by the name each has in a row. The entries "mask" and "weight" of the batch,
    where there are any, say what counts in both.

    The model sees every row all the same, and so do its batch statistics and mixtures of experts. A model with a
    parameter ``mask`` besides its inputs is told in it the rows of which something counts, where the batch says what
    counts: bool (batch, length) where the first input is a sequence, integers (batch, length) or (batch, length,
    features), else (batch,). `BatchNorm` and `MixtureOfExperts` take it. `next_token` does the same. What does not
    count may be a missing target, NaN or a label such as -1, as far as the loss goes; data declared to be finite or to
    have classes are held to that by `fit` in every row, and NaN among the inputs reaches the gradient.

    The loss says what the outputs are: logits of classes, logits of independent "binary labels", or numbers. Without
    ``metrics`` there is the one that goes with it: "accuracy", "binary_accuracy" or "mean_absolute_error"; none for a
    loss of one's own. A metric that takes the outputs for something else is refused, and so, on the device, is a target
    that the loss or a metric would misread, such as a label outside the classes. docs/metrics.md lists them all.

    Raises `ConfigError` with the nearest names for an unknown loss or metric, for one name given to two metrics or
    taken by a column of `fit`, and for an input or target called "mask" or "weight"; `DataError` for a feature the
    batch lacks and for shapes that do not fit.

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
    """Raise `ConfigError` for a metric that would take the outputs for something else than the loss does."""
    other = metrics_.kind(metric)
    if kind is not None and other is not None and kind != other:
        raise ConfigError(
            f"supervised: the metric {name!r} is of {other}, but the loss {metrics_.plain(loss).__name__} takes the "
            f"outputs for {kind}; metrics of {kind} are "
            f"{', '.join(repr(each.__name__) for each in metrics_.KINDS[kind])}, and a function (outputs, target, "
            f"weight) of your own may take them for anything"
        )
