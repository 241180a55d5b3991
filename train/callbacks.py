"""Callbacks: functions that `fit` calls after each row of metrics, and that may end the run or change its state.

A callback is any function ``callback(event, memory) -> bool | TrainState | None``. True ends the run. A `TrainState`
replaces the state of the run: ``event.state.replace(...)`` with arrays of the same shapes, dtypes and shardings, equal
on all processes. The metrics of the row were measured before the change. So if a callback changes the model,
`fit(best=)` never takes the checkpoint of the changed model as the best.

``memory`` is a dict of JSON values for each callback, empty at first. `fit` saves it in every checkpoint, so a resumed
run continues as if unbroken. Each process calls its own callbacks. The first process decides for all whether the run
ends.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest
from sapwood.train.optimizers.learning_rate import multiply_rates
from sapwood.train.state.train_state import TrainState

_LOADED = time.time()  # default of `Event.begun`, for loops of one's own without `fit`


@dataclasses.dataclass(frozen=True)
class Event:
    """One row of metrics, as a callback sees it.

    Attributes:
        step: number of batches done.
        steps: number of batches of the whole run.
        epoch: the epoch of this row, counted from 1.
        epoch_end: True if this row closes the epoch; ``row`` then holds the validation metrics too.
        row: the metrics by name, with "step" and "epoch".
        state: the `TrainState` after ``step``. Read it before the callback returns: the next step reuses its buffers.
        begun: when this `fit` began, in seconds as from `time.time`.
    """

    step: int
    steps: int
    epoch: int
    epoch_end: bool
    row: Mapping[str, Any]
    state: Any
    begun: float = dataclasses.field(default=_LOADED, compare=False)


class Callback(Protocol):
    """Protocol of callbacks; a plain function with these arguments is one.

    >>> def stop_when_good(event, memory):
    ...     return event.row["loss"] < 0.1
    >>> stop_when_good(Event(1, 9, 1, False, {"loss": 0.05}, None), {})
    True
    """

    def __call__(self, event: Event, memory: dict[str, Any], /) -> bool | TrainState | None: ...


def value(row: Mapping[str, Any], name: str, who: str) -> float:
    """Return a metric of a row as a float.

    Args:
        row: the row of metrics.
        name: name of the metric.
        who: name of the callback, for the message.

    Raises:
        ConfigError: the row has no such metric (the message has the nearest names), or it is not a single number.
    """
    if name not in row:
        raise ConfigError(
            f"{who} watches {name!r}, but the row has no such metric{nearest(name, row)} "
            f"(there are {', '.join(row)}; names with validation_ need fit(validation=...))"
        )
    if np.ndim(row[name]):
        raise ConfigError(f"{who} watches {name!r}, which is an array of shape {np.shape(row[name])}, not one number")
    return float(row[name])


def better(new: float, best: float, mode: str, by: float = 0.0) -> bool:
    """Return True if a value of a metric is better than the best one so far. NaN never is.

    Args:
        new: the value.
        best: the best value so far.
        mode: "max" if larger is better, "min" if smaller is.
        by: amount by which ``new`` must be better.

    >>> better(0.9, 0.8, "max"), better(float("nan"), 1.0, "min")
    (True, False)
    """
    return new > best + by if mode == "max" else new < best - by


def check(callbacks: Any) -> tuple[Callback, ...]:
    """Check the callbacks given to `fit`, before anything runs, and return them as a tuple.

    Raises:
        ConfigError: this is not a sequence, or an item is a class or not callable.

    >>> check([EarlyStopping])
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: fit(callbacks=...): EarlyStopping is a class; a callback is EarlyStopping(...)
    """
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"fit(callbacks=...) takes a list of functions (event, memory), got {callbacks!r}")
    for callback in callbacks:
        if isinstance(callback, type):
            name = callback.__name__
            raise ConfigError(f"fit(callbacks=...): {name} is a class; a callback is {name}(...)")
        if not callable(callback):
            raise ConfigError(f"fit(callbacks=...): a callback is a function (event, memory), got {callback!r}")
    return tuple(callbacks)


def _check_mode(callback: Any) -> None:
    if callback.mode not in ("min", "max"):
        raise ConfigError(f"{type(callback).__name__}(mode={callback.mode!r}): the mode is 'min' or 'max'")


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Ends the run when a metric has not improved for some epochs in a row.

    It looks only at rows that close an epoch. (Prechelt 1998, "Early stopping, but when?")

    Attributes:
        monitor: name of the metric.
        patience: number of epochs in a row without improvement that end the run; at least 1.
        mode: "min" if smaller is better, "max" if larger is.
        delta: an improvement must be larger than this.
        restore: True ends the run with the state where ``monitor`` was best, as `fit(best="min:validation_loss")` does;
            False ends it with the last state.

    Raises:
        ConfigError: ``mode`` or ``patience`` is invalid, or the row has no such metric.

    >>> stop, memory = EarlyStopping("validation_loss", patience=1), {}
    >>> [stop(Event(1, 9, 1, True, {"validation_loss": x}, None), memory) for x in (0.5, 0.4, 0.6)]
    [False, False, True]
    """

    monitor: str = "validation_loss"
    patience: int = 3
    mode: str = "min"
    delta: float = 0.0
    restore: bool = False

    def __post_init__(self) -> None:
        _check_mode(self)
        if self.patience < 1:
            raise ConfigError(f"EarlyStopping(patience={self.patience}): the patience is at least 1 epoch")

    def __call__(self, event: Event, memory: dict[str, Any]) -> bool:
        if not event.epoch_end:
            return False
        new = value(event.row, self.monitor, "EarlyStopping")
        best = memory.get("best")
        first = best is None or (math.isnan(best) and not math.isnan(new))  # any number is better than NaN
        if first or better(new, memory["best"], self.mode, self.delta):
            memory.update(best=new, step=event.step, waited=0)
        else:
            memory["waited"] += 1
        return memory["waited"] >= self.patience


@dataclasses.dataclass(frozen=True)
class ReduceOnPlateau:
    """Multiplies the learning rate by a factor when a metric no longer improves, as Keras's ReduceLROnPlateau does.

    The optimizer must hold its rate in its state. `optax.inject_hyperparams` makes such an optimizer, for instance
    ``optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)``. (`optax.contrib.reduce_on_plateau` is different: it is
    a part of the optimizer, counts steps, and sees only the loss of each training batch.)

    Attributes:
        monitor: name of the metric.
        factor: factor for the rate, between 0 and 1.
        patience: number of epochs in a row without improvement before the rate falls; at least 1.
        mode: "min" if smaller is better, "max" if larger is.
        delta: an improvement must be larger than this.
        cooldown: length in epochs of a pause after each change of the rate. In the pause, epochs without improvement do
            not count toward ``patience``, except the last epoch of the pause, as in Keras.
        least: the rate does not fall below this.

    Raises:
        ConfigError: ``mode``, ``factor`` or ``patience`` is invalid, the row has no such metric, or the optimizer does
            not hold its rate or has a schedule for it.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    >>> state = TrainState(0, {}, {}, tx.init({"w": jnp.ones(2)}), None)
    >>> reduce, memory = ReduceOnPlateau("validation_loss", factor=0.5, patience=1), {}
    >>> said = [reduce(Event(n, 9, n, True, {"validation_loss": x}, state), memory) for n, x in ((1, 0.4), (2, 0.6))]
    >>> said[0], said[1].opt_state.hyperparams["learning_rate"].tolist()
    (None, 0.25)
    """

    monitor: str = "validation_loss"
    factor: float = 0.1
    patience: int = 10
    mode: str = "min"
    delta: float = 1e-4
    cooldown: int = 0
    least: float = 0.0

    def __post_init__(self) -> None:
        _check_mode(self)
        if not 0 < self.factor < 1 or self.patience < 1:
            raise ConfigError(f"{self}: a factor between 0 and 1 and a patience of at least 1 epoch are expected")

    def __call__(self, event: Event, memory: dict[str, Any]) -> TrainState | None:
        if not event.epoch_end:
            return None
        new = value(event.row, self.monitor, "ReduceOnPlateau")
        if not memory:
            # Raises at once if the rate cannot be changed.
            multiply_rates(event.state.opt_state, 1.0, 0.0, "ReduceOnPlateau")
            memory.update(best=None, waited=0, cooling=0)
        resting = memory["cooling"] > 1
        memory["cooling"] = max(memory["cooling"] - 1, 0)
        best = memory["best"]
        if (best is None and not math.isnan(new)) or (best is not None and better(new, best, self.mode, self.delta)):
            memory.update(best=new, waited=0)
            return None
        memory["waited"] = 0 if resting else memory["waited"] + 1
        if memory["waited"] < self.patience:
            return None
        opt_state, _ = multiply_rates(event.state.opt_state, self.factor, self.least, "ReduceOnPlateau")
        memory.update(waited=0, cooling=self.cooldown)
        return event.state.replace(opt_state=opt_state)


@dataclasses.dataclass(frozen=True)
class StopAt:
    """Ends the run as soon as a metric reaches a target.

    Attributes:
        monitor: name of the metric. One that starts with "validation_" is read only at the end of an epoch.
        target: the value to reach.
        mode: "max" stops at ``target`` or above, "min" at ``target`` or below.

    >>> StopAt("accuracy", 0.9)(Event(1, 9, 1, True, {"accuracy": 0.95}, None), {})
    True
    """

    monitor: str
    target: float
    mode: str = "max"

    def __post_init__(self) -> None:
        _check_mode(self)

    def __call__(self, event: Event, memory: dict[str, Any]) -> bool:
        if self.monitor.startswith("validation_") and not event.epoch_end:
            return False
        new = value(event.row, self.monitor, "StopAt")
        return new >= self.target if self.mode == "max" else new <= self.target


@dataclasses.dataclass(frozen=True)
class TimeLimit:
    """Ends the run after some seconds of wall time, which include compilation and earlier parts of a resumed run.

    The number of steps of such a run depends on the speed of the machine. `StopAt` and ``steps`` of `fit` end a run
    independently of the speed.
    """

    seconds: float

    def __call__(self, event: Event, memory: dict[str, Any]) -> bool:
        now = time.time()
        since = memory["last"] if memory.get("begun") == event.begun else event.begun  # the first row of this `fit`
        memory.update(spent=memory.get("spent", 0.0) + now - since, last=now, begun=event.begun)
        return memory["spent"] >= self.seconds


@dataclasses.dataclass(frozen=True)
class OnEpoch:
    """Calls ``function(event)`` at the end of each ``every``-th epoch, for instance to draw samples.

    The result of ``function`` is ignored.

    >>> OnEpoch(lambda event: print("epoch", event.epoch))(Event(1, 9, 1, True, {}, None), {})
    epoch 1
    """

    function: Callable[[Event], Any]
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"OnEpoch(every={self.every}): at least every epoch is expected, which is 1")

    def __call__(self, event: Event, memory: dict[str, Any]) -> None:
        if event.epoch_end and event.epoch % self.every == 0:
            self.function(event)


for _callback in (EarlyStopping, ReduceOnPlateau, StopAt):
    _callback.__init__ = migration_hints.answering(_callback.__name__, migration_hints.CALLBACKS)(_callback.__init__)


if not TYPE_CHECKING:

    def __getattr__(name: str):
        known = [each for each, value in globals().items() if isinstance(value, type) and value.__module__ == __name__]
        return migration_hints.missing(__name__, migration_hints.TRAIN, name, known)
