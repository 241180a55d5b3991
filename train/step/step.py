"""The pure training step: gradient, clipping, optimizer update, running means, and the result of checks.

An option that a run does not use adds no operation to the compiled step. The gradient is that of `forward`, over
micro-batches by `accumulate`. On a mesh, `plan.beside` says how gradients and optimizer state are split during the
step. `_gate` keeps the old values in a step that fails a check or overflows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapwood.train.config import Config
from sapwood.train.optimizers import learning_rate
from sapwood.train.optimizers.blockwise import wrap_for_stacks
from sapwood.train.state import ema, plan
from sapwood.train.state.train_state import TrainState
from sapwood.train.state.trainable import join, split
from sapwood.train.step import checks
from sapwood.train.step.accumulate import accumulate
from sapwood.train.step.forward import Pass, forward, hold
from sapwood.train.step.loss_scale import SKIPPED, Skipped, all_finite, unscaled


def train_step(config: Config, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
    """Return the state after one batch, and the metrics of that batch; see `Trainer.step`."""
    trained, frozen = split(state.params, config.trainable)
    key = jax.random.fold_in(state.rng, state.step)  # the compiler removes this if the model draws nothing
    scale = None if state.scale is None else state.scale.scale
    beside = plan.beside(config, state, batch)
    if beside is not None and beside.host is not None:
        state = state.replace(opt_state=jax.device_put(state.opt_state, beside.opt_state))

    def loss(trained: dict, model_state: dict, key: Any, batch: Any, ordinary: Any = None) -> tuple[jax.Array, Pass]:
        out = forward(config, join(trained, frozen), model_state, key, batch, train=True, ordinary=ordinary)
        if config.accumulate > 1:
            hold(config.objective, out.metrics, f"Trainer(accumulate={config.accumulate}) adds micro-batches up")
        return (out.loss if scale is None else out.loss * scale), out

    gradient, plain = jax.grad(loss, has_aux=True), lambda *args: (None, loss(*args)[1])
    if beside is not None:
        gradient = _in_pieces(gradient, beside)
    if config.accumulate > 1:
        n = config.accumulate
        gradient, plain = accumulate(gradient, n, plain), accumulate(plain, n)
    grads, out = gradient(trained, state.state, key, batch)
    with jax.named_scope("optimizer"):  # profiles show the update under this name, apart from the model
        if scale is not None:
            grads = jax.tree.map(lambda g: unscaled(g, scale), grads)
        metrics = out.metrics
        finite = None
        if config.clip is not None:
            grads, norm = clip(grads, config.clip)
            metrics["gradient_norm"], finite = norm, jnp.isfinite(norm)
        elif scale is not None or config.checks:
            finite = all_finite(grads, alone=config.mesh is None)
        if beside is not None:  # each device updates its shards; the parameters are gathered below
            trained = jax.lax.with_sharding_constraint(trained, beside.moments)
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic mixes dtypes
            optimizer = wrap_for_stacks(config.optimizer, plan.stacks_of(config, state, batch))
            updates, opt_state = optimizer.update(
                grads, state.opt_state, trained,
                value=out.loss, grad=grads, value_fn=lambda trained: plain(trained, state.state, key, batch)[1].loss,
            )  # fmt: skip
        trained: Any = optax.apply_updates(trained, updates)
        after = state.replace(state=out.state, opt_state=opt_state)
        if config.ema is not None:
            keep = ema.decay_of(config.ema, state.step if state.scale is None else state.step - state.scale.skipped)
            means = ema.update((state.ema, state.ema_state), (trained, ema.averaged_entries(out.state)), keep)
            after = after.replace(ema=means[0], ema_state=means[1])
        if beside is not None:
            trained = jax.lax.with_sharding_constraint(trained, beside.params)
        after, metrics = _gate(config, state, after.replace(params=join(trained, frozen)), out, finite, metrics)
        metrics = {**metrics, **learning_rate.rate_metrics(config.learning_rate, state, after.opt_state)}
        if beside is not None and beside.host is not None:
            after = after.replace(opt_state=jax.device_put(after.opt_state, beside.host))
        return after.replace(step=state.step + 1), metrics


def _in_pieces(gradient: Any, beside: plan.Beside) -> Any:
    """Return the same gradient function, with a sharded result: each device gets the sum for the shards it updates."""

    def pieces(*args: Any) -> tuple[Any, Pass]:
        grads, out = gradient(*args)
        return jax.lax.with_sharding_constraint(grads, beside.moments), out

    return pieces


def clip(grads: Any, limit: float) -> tuple[Any, jax.Array]:
    """Scale gradients down to a global norm of at most ``limit``. Pascanu et al. 2013, arXiv:1211.5063.

    Returns the gradients in their own dtypes, and the norm that they had, in float32.

    >>> grads, norm = clip({"w": jnp.array([3., 4.])}, 1.0)
    >>> [round(x, 3) for x in grads["w"].tolist()], float(norm)
    ([0.6, 0.8], 5.0)
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), norm


def _gate(config: Config, before: TrainState, after: TrainState, out: Pass, finite: Any, metrics: dict):
    """Return the state and metrics of a step, with the old values where the step must not count.

    After a failed check, in this step or an earlier one, parameters and model state keep their old values, so that the
    host can replay the step. The other fields of the state may change; nothing reads them after that. Under loss
    scaling, a step whose gradients overflow is no failure while the scale is above 1. It is skipped: it changes the
    scale, and no variables, optimizer state or running means.

    Args:
        config: the config.
        before: the state before the step.
        after: the state that the step computed.
        out: the result of the forward pass.
        finite: boolean scalar, True if all gradients (with ``clip``, their norm) are finite; None if nothing needs it.
        metrics: the metrics of the step so far.
    """
    scaled, good = before.scale is not None, None
    if config.checks:
        flags, gradients = dict(out.ok), checks.GRADIENTS if config.clip is None else checks.NORM
        if scaled:
            flags[gradients] = finite | (before.scale.scale > 1)
        else:
            flags[checks.FINITE] = known = jnp.isfinite(out.loss)
            if not checks.guarded(before.opt_state):
                flags[gradients] = finite | ~known  # a non-finite loss is reported once, as FINITE
        metrics = {**metrics, checks.FLAGS: checks.Flags(flags)}
        good = before.ok
        for flag in flags.values():
            good = good & flag
        after = after.replace(ok=good)
    if scaled:
        assert config.scaling is not None
        metrics[SKIPPED] = Skipped(jnp.int32(~finite))
        good = finite if good is None else good & finite
        after = after.replace(
            opt_state=_keep(finite, after.opt_state, before.opt_state),
            ema=_keep(finite, after.ema, before.ema),
            ema_state=_keep(finite, after.ema_state, before.ema_state),
            scale=config.scaling.update(before.scale, finite),
        )
    if good is not None:
        after = after.replace(
            params=_keep(good, after.params, before.params), state=_keep(good, after.state, before.state)
        )
    return after, metrics


def _keep(good: jax.Array, new: Any, old: Any) -> Any:
    """Return the new tree if ``good`` is True, else the old one. A leaf that is the same in both adds no operation."""
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(good, n, o), new, old)
