"""Checks of a step: bits collected on the device, and the replay that turns a false one into a sentence.

While all is well a check costs its own comparison. Where one fails the parameters stop changing (`TrainState.ok`),
the host finds out when it fetches the metrics, and that one batch is run again without jit, on the state it met.
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
"""Where a step's metrics hold its `Flags`, if it has any."""

FINITE = "the loss is not finite"
GRADIENTS = "the gradients are not finite"
NORM = "the norm of the gradients is not finite"


def guarded(opt_state: Any) -> bool:
    """Whether the optimizer itself looks after gradients that are not finite, so that they are no failure:
    `optax.apply_if_finite`, `optax.zero_nans`, `optax.MultiSteps(should_skip_update_fn=...)`."""

    def guards(x: Any) -> bool:
        return isinstance(x, optax.ApplyIfFiniteState | optax.ZeroNansState) or bool(
            isinstance(x, optax.MultiStepsState) and x.skip_state
        )

    return any(map(guards, jax.tree.leaves(opt_state, is_leaf=guards)))


class Flags(Metric):
    """The checks of one or several steps: ``ok`` maps a message to one bit, true where all was well."""

    ok: dict[str, Any]

    def merge(self, other: "Flags") -> "Flags":
        return jax.tree.map(operator.and_, self, other)

    def compute(self) -> bool:
        return all(bool(ok) for ok in self.ok.values())

    def failed(self) -> list[str]:
        """The messages of what failed."""
        return [message for message, ok in self.ok.items() if not bool(ok)]


def flat(checks: Mapping[str, Any]) -> dict[str, Any]:
    """The nested checks of ``updates.checks`` as one dict from "layer path: message" to a bit."""
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
    """Run one batch without jit and raise a `CheckError` that says what is wrong, in which layer, at which entry.

    ``state`` is the `TrainState` that the batch met, ``where`` names the batch and ``name`` the example of a row of it.
    Returns where nothing is found.
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
    for kind in ("params", "state"):
        for path, x in leaves(getattr(state, kind)):
            if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
                raise CheckError(
                    f"{kind} {join(path)} are not finite before this step: an earlier gradient was not, "
                    f"or the learning rate is too high; try Trainer(clip=1.0) or a smaller learning rate"
                )


def _first_nan(config: Config, state: Any, batch: Mapping[str, Any], key: Any, train: bool) -> str | None:
    """What makes the loss non-finite; the eager `v.check` of the forward pass raises before that."""

    def run():
        return _loss(config, state.params, state.state, batch, key, train)

    total = run()
    if bool(jnp.isfinite(total)):
        return None
    try:
        with jax.debug_nans(True):
            run()
    except FloatingPointError as error:
        # Layers add their place to what is raised inside them, the innermost first.
        notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in ")]
        return f"{FINITE}: the first NaN arises {notes[0] if notes else 'outside any layer'}"
    return f"{FINITE} ({float(total)}): the inputs and the variables are, so it overflowed in the forward pass"


def _gradients(config: Config, state: Any, batch: Mapping[str, Any], key: Any) -> str | None:
    """Which gradients are not finite, of a loss that is."""
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
    """What is wrong with the norm by which finite gradients are clipped."""
    squares = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    if bool(jnp.isfinite(squares)):
        return None
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(grads) if g.size)
    return (
        f"{NORM}: the gradients are, up to {largest:.2g}, but float32 holds no square of what is above 1.8e19, "
        f"so Trainer(clip={clip}) cannot scale them; scale the loss or the targets down"
    )


def _loss(config: Config, params: Any, model_state: Any, batch: Any, key: Any, train: bool) -> Any:
    """What is minimised, with the losses that layers add."""
    frozen = trainable.frozen_scopes(params, config.trainable)
    v = bind(params, model_state, rng=key, train=train, policy=config.policy, capture=False, frozen=frozen)
    (loss, _), updates = pure(config.objective)(v, batch)
    return sum(jax.tree.leaves(updates.losses), of_mean(loss) if isinstance(loss, Mean) else loss)
