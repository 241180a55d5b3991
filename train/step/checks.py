"""Checks of a step: bits collected on the device, and the replay that explains a failed check.

A check that passes costs only its own comparison. From a failed check on, the parameters and the model state do not
change (`TrainState.ok`). The host sees the failure when it fetches the metrics. `explain` then runs that one batch
again without jit, on the state before it, and raises an error that names the layer and the entry.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapwood.core.bind import bind, pure
from sapwood.core.errors import CheckError
from sapwood.core.messages import first_names
from sapwood.core.paths import join, leaves
from sapwood.losses.reduction import of_mean
from sapwood.metrics import Mean, Metric
from sapwood.train.config import Config
from sapwood.train.objectives.supervised import takes_mask
from sapwood.train.state import trainable

FLAGS = "checks"
"""Name of the `Flags` in the metrics of a step, if it has any."""

FINITE = "the loss is not finite"
GRADIENTS = "the gradients are not finite"
NORM = "the norm of the gradients is not finite"


def guarded(opt_state: Any) -> bool:
    """Return True if the optimizer itself handles non-finite gradients, so that they are no failure.

    Such optimizers are `optax.apply_if_finite`, `optax.zero_nans` and `optax.MultiSteps(should_skip_update_fn=...)`.
    They are recognized by the optimizer state.
    """

    def guards(x: Any) -> bool:
        return isinstance(x, optax.ApplyIfFiniteState | optax.ZeroNansState) or bool(
            isinstance(x, optax.MultiStepsState) and x.skip_state
        )

    return any(map(guards, jax.tree.leaves(opt_state, is_leaf=guards)))


class Flags(Metric):
    """The checks of one or several steps.

    Attributes:
        ok: dict from a message to a boolean scalar, True if the check passed in all steps.
    """

    ok: dict[str, Any]

    def merge(self, other: "Flags") -> "Flags":
        return jax.tree.map(operator.and_, self, other)

    def compute(self) -> bool:
        return all(bool(ok) for ok in self.ok.values())

    def failed(self) -> list[str]:
        """Return the messages of the checks that failed."""
        return [message for message, ok in self.ok.items() if not bool(ok)]


def flat(checks: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the nested checks of ``updates.checks`` into a dict from "layer path: message" to a boolean scalar."""
    return {f"{join(path[:-1])}: {path[-1]}": ok for path, ok in leaves(dict(checks))}


def explain(
    config: Config,
    state: Any,
    batch: Mapping[str, Any],
    key: Any,
    *,
    train: bool,
    where: str,
    name: Callable[[int], str],
) -> None:
    """Run one batch without jit, and raise a `CheckError` that says what is wrong, in which layer, at which entry.

    Args:
        config: the config.
        state: the `TrainState` before the batch.
        batch: the batch, a dict of arrays ``(batch, ...)``.
        key: the random key of the step; None in evaluation.
        train: True for a training step, whose gradients are examined too.
        where: text that names the batch, for the message.
        name: function from the number of a row to the name of its example.

    Returns:
        None, if nothing is found.

    Raises:
        CheckError: an input, a variable, the loss or a gradient is not finite, or a `v.check` fails.
    """
    try:
        with jax.disable_jit():
            _inputs(batch, takes_mask(config.objective))
            _variables(state)
            found = _first_nan(config, state, batch, key, train)
            if found is None and train:
                found = _gradients(config, state, batch, key)
            if found is not None:
                raise CheckError(found)
    except CheckError as error:
        row, rows = error.entry or (0, None)
        example = f": entry {row} is {name(row)}" if rows == len(next(iter(batch.values()))) else ""
        error.add_note(f"{where}{example}")
        if state.scale is not None and train:
            error.add_note(
                "the loss scale had fallen to 1 by then, step by step: float16 ends at 65504, bfloat16 does not"
            )
        raise


def _inputs(batch: Mapping[str, Any], masked: bool) -> None:
    """Raise `CheckError` if an input is not finite. With ``masked``, entries that the mask leaves out do not count."""
    mask = np.asarray(batch["mask"]) if masked and "mask" in batch else None
    for name, x in batch.items():
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            continue
        values = np.asarray(x, np.float32)
        bad = ~np.isfinite(values)
        if mask is not None:
            counts = mask.astype(bool) if bad.shape[: mask.ndim] == mask.shape else mask.reshape(len(mask), -1).any(1)
            bad &= counts.reshape(counts.shape + (1,) * (bad.ndim - counts.ndim))
        if bad.any():
            places = np.argwhere(bad)
            entry, *inside = places[0].tolist()
            at = f"entry {entry}" + (f", position {', '.join(map(str, inside))}" if inside else "")
            error = CheckError(
                f"input {name!r} of the batch is {values[bad][0]} at {at}; {len(set(places[:, 0]))} of "
                f"{len(values)} entries are not finite: clean the data or mask them"
            )
            error.entry = entry, len(values)
            raise error


def _variables(state: Any) -> None:
    """Raise `CheckError` if a parameter or an entry of the model state is not finite."""
    for kind in ("params", "state"):
        for path, x in leaves(getattr(state, kind)):
            if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
                raise CheckError(
                    f"{kind} {join(path)} are not finite before this step: an earlier gradient was not, "
                    f"or the learning rate is too high; try Trainer(clip=1.0) or a smaller learning rate"
                )


def _first_nan(config: Config, state: Any, batch: Mapping[str, Any], key: Any, train: bool) -> str | None:
    """Return a message that says where the loss becomes non-finite, or None if it is finite.

    A `v.check` that fails in the forward pass raises first, since the pass runs eagerly.
    """

    def run():
        return _loss(config, state.params, state.state, batch, key, train)

    total = run()
    if bool(jnp.isfinite(total)):
        return None
    try:
        with jax.debug_nans(True):
            run()
    except FloatingPointError as error:
        # Each layer adds a note with its path to an error that is raised inside it. The innermost layer comes first.
        notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in ")]
        return f"{FINITE}: the first NaN arises {notes[0] if notes else 'outside any layer'}"
    return f"{FINITE} ({float(total)}): the inputs and the variables are, so it overflowed in the forward pass"


def _gradients(config: Config, state: Any, batch: Mapping[str, Any], key: Any) -> str | None:
    """Return a message that names the non-finite gradients of a finite loss, or None if all are finite."""
    trained, frozen = trainable.split(state.params, config.trainable)
    loss = lambda trained: _loss(config, trainable.join(trained, frozen), state.state, batch, key, True)  # noqa: E731
    grads = jax.grad(loss)(trained)
    bad = [join(path) for path, g in leaves(grads) if not bool(jnp.isfinite(g).all())]
    if not bad:
        return None if config.clip is None else _norm(grads, config.clip)
    return (
        f"the gradient of {first_names(bad, quote=False)} is not finite, though the loss is: a derivative has no value "
        f"there, as that of a square root, a norm or a power at 0. Add an epsilon inside, or choose a safe argument by "
        f"jnp.where before it (a jnp.where after it lets NaN through)"
    )


def _norm(grads: Any, clip: float) -> str | None:
    """Return a message if the norm of finite gradients, used for clipping, overflows; else None."""
    squares = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    if bool(jnp.isfinite(squares)):
        return None
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(grads) if g.size)
    return (
        f"{NORM}: the gradients are, up to {largest:.2g}, but float32 holds no square of what is above 1.8e19, "
        f"so Trainer(clip={clip}) cannot scale them; scale the loss or the targets down"
    )


def _loss(config: Config, params: Any, model_state: Any, batch: Any, key: Any, train: bool) -> Any:
    """Compute the total loss that is minimized: that of the objective plus those that layers add."""
    frozen = trainable.frozen_scopes(params, config.trainable)
    v = bind(params, model_state, rng=key, train=train, policy=config.policy, capture=False, frozen=frozen)
    (loss, _), updates = pure(config.objective)(v, batch)
    return sum(jax.tree.leaves(updates.losses), of_mean(loss) if isinstance(loss, Mean) else loss)
