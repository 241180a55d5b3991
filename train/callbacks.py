"""Callbacks: what looks at a run after each row of metrics, and may end it or change its state.

A callback is any function ``callback(event, memory) -> bool | TrainState | None``. True ends the run. A state is one to
go on with: ``event.state.replace(...)`` with arrays of the same shapes, dtypes and places, the same on each of several
processes; ``best`` measures what was before, and a checkpoint with other parameters than were measured is not the best.
``memory`` is its own dict of JSON values, empty at first, kept by the loop and saved in every checkpoint, so
a resumed run goes on as if unbroken. Each of several processes calls its own, and what the first one's say of the end
holds for all.
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
from sapwood.train.optimizers.learning_rate import multiplied
from sapwood.train.state.train_state import TrainState

_LOADED = time.time()  # stands for the beginning where there is no `fit`, but a loop of one's own


@dataclasses.dataclass(frozen=True)
class Event:
    """One row of metrics, as a callback sees it.

    ``step`` batches are done (of ``steps``), ``epoch`` is counted from 1, and ``epoch_end`` says whether this row
    closes it (then ``row`` holds the validation metrics too). ``state`` is the `TrainState` after ``step``: read it
    before returning, its buffers are reused by the next step. ``begun`` is when this `fit` began, as `time.time` says.
    """

    step: int
    steps: int
    epoch: int
    epoch_end: bool
    row: Mapping[str, Any]
    state: Any
    begun: float = dataclasses.field(default=_LOADED, compare=False)


class Callback(Protocol):
    """Anything callable like this; a plain function will do.

    >>> def stop_when_good(event, memory):
    ...     return event.row["loss"] < 0.1
    >>> stop_when_good(Event(1, 9, 1, False, {"loss": 0.05}, None), {})
    True
    """

    def __call__(self, event: Event, memory: dict[str, Any], /) -> bool | TrainState | None: ...


def value(row: Mapping[str, Any], name: str, who: str) -> float:
    """A metric of a row by name; `ConfigError` with the nearest names if it is not there, or no single number."""
    if name not in row:
        raise ConfigError(
            f"{who} watches {name!r}, but the row has no such metric{nearest(name, row)} "
            f"(there are {', '.join(row)}; names with validation_ need fit(validation=...))"
        )
    if np.ndim(row[name]):
        raise ConfigError(f"{who} watches {name!r}, which is an array of shape {np.shape(row[name])}, not one number")
    return float(row[name])


def better(new: float, best: float, mode: str, by: float = 0.0) -> bool:
    """Whether ``new`` beats ``best`` by more than ``by``; NaN never does.

    >>> better(0.9, 0.8, "max"), better(float("nan"), 1.0, "min")
    (True, False)
    """
    return new > best + by if mode == "max" else new < best - by


def check(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks that `fit` was given; `ConfigError` where they cannot be, before anything has run.

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
    """End the run when ``monitor`` has not improved by more than ``delta`` for ``patience`` epochs in a row.

    ``mode`` is "min" or "max". With ``restore`` the run ends with the state where ``monitor`` was best, not with the
    last one, as `fit(best="min:validation_loss")` does. Looks at the rows that close an epoch. (Prechelt 1998, "Early
    stopping, but when?")
    Raises `ConfigError` for another mode, a patience below 1, or a metric that is not in the row.

    >>> stop, memory = EarlyStopping("validation_loss", patience=1), {}
    >>> [stop(Event(1, 9, 1, True, {"validation_loss": x}, None), memory) for x in (0.5, 0.4, 0.6)]
    [False, False, True]
    """

    monitor: str = "validation_loss"
    patience: int = 3
    mode: str = "min"
    delta: float = 0.0
    restore: bool = False

    def __post_init__(self):
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
    """Multiply the learning rate by ``factor`` where ``monitor`` has not improved by more than ``delta`` for
    ``patience`` epochs in a row, as Keras's ReduceLROnPlateau does.

    ``mode`` is "min" or "max". After that, ``cooldown`` epochs are not counted; the rate does not fall below ``least``.
    The optimizer has to hold its rate, as `optax.inject_hyperparams` makes it, for instance
    ``optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)``. (`optax.contrib.reduce_on_plateau` is a part of the
    optimizer that counts steps, and sees the loss of each training batch alone.) Raises `ConfigError` for another
    optimizer, one whose rate is a schedule, a factor or patience that cannot be, or a metric that is not in the row.

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

    def __post_init__(self):
        _check_mode(self)
        if not 0 < self.factor < 1 or self.patience < 1:
            raise ConfigError(f"{self}: a factor between 0 and 1 and a patience of at least 1 epoch are expected")

    def __call__(self, event: Event, memory: dict[str, Any]) -> TrainState | None:
        if not event.epoch_end:
            return None
        new = value(event.row, self.monitor, "ReduceOnPlateau")
        if not memory:
            multiplied(event.state.opt_state, 1.0, 0.0, "ReduceOnPlateau")  # says at once where it cannot
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
        opt_state, _ = multiplied(event.state.opt_state, self.factor, self.least, "ReduceOnPlateau")
        memory.update(waited=0, cooling=self.cooldown)
        return event.state.replace(opt_state=opt_state)


@dataclasses.dataclass(frozen=True)
class StopAt:
    """End the run as soon as ``monitor`` reaches ``target`` ("max": at least, "min": at most).

    >>> StopAt("accuracy", 0.9)(Event(1, 9, 1, True, {"accuracy": 0.95}, None), {})
    True
    """

    monitor: str
    target: float
    mode: str = "max"

    def __post_init__(self):
        _check_mode(self)

    def __call__(self, event: Event, memory: dict[str, Any]) -> bool:
        if self.monitor.startswith("validation_") and not event.epoch_end:
            return False
        new = value(event.row, self.monitor, "StopAt")
        return new >= self.target if self.mode == "max" else new <= self.target


@dataclasses.dataclass(frozen=True)
class TimeLimit:
    """End the run after ``seconds`` of wall time, compiling and earlier parts of a resumed run counted.

    A limit in time makes the length of a run depend on the machine; use `StopAt` or ``steps`` where it must not.
    """

    seconds: float

    def __call__(self, event: Event, memory: dict[str, Any]) -> bool:
        now = time.time()
        since = memory["last"] if memory.get("begun") == event.begun else event.begun  # another `fit` was resumed
        memory.update(spent=memory.get("spent", 0.0) + now - since, last=now, begun=event.begun)
        return memory["spent"] >= self.seconds


@dataclasses.dataclass(frozen=True)
class OnEpoch:
    """Call ``function(event)`` at the end of each ``every``-th epoch: to draw samples, say. Its result is ignored.

    >>> OnEpoch(lambda event: print("epoch", event.epoch))(Event(1, 9, 1, True, {}, None), {})
    epoch 1
    """

    function: Callable[[Event], Any]
    every: int = 1

    def __post_init__(self):
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
