"""The test whether a training state is finite, so that a run can continue from it.

It runs where a state is saved, so no step of a run pays for it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.saving.digest import HOST_ELEMENTS, named_leaves
from sapwood.train.state.train_state import TrainState


def not_finite(state: TrainState) -> list[str]:
    """Return the paths of the arrays that are not finite; an empty list if all are.

    Parameters and their EMA may be neither NaN nor infinite. Other arrays may be infinite, but not NaN: optimizers and
    layers start a minimum at infinity.

    >>> state = TrainState(0, {"w": jnp.array([1.0, jnp.inf])}, {"least": jnp.array(jnp.inf)}, {}, None)
    >>> not_finite(state)
    ['params/w']
    """
    parts = {"params": state.params, "ema": state.ema, "state": state.state, "ema_state": state.ema_state,
             "opt_state": state.opt_state}  # fmt: skip
    leaves = {name: x for name, x in named_leaves(parts).items() if jnp.issubdtype(x.dtype, jnp.inexact) and x.size}
    if not leaves:
        return []
    strict = [name.startswith(("params/", "ema/")) for name in leaves]
    here = all(x.is_fully_addressable for x in leaves.values())
    if here and (jax.default_backend() == "cpu" or sum(x.size for x in leaves.values()) < HOST_ELEMENTS):
        good = [_good_here(x, each) for x, each in zip(leaves.values(), strict, strict=True)]
    else:
        good = np.asarray(_on_devices([*leaves.values()], tuple(strict)))
    return [name for name, ok in zip(leaves, good, strict=True) if not ok]


def _good_here(x: jax.Array, strict: bool) -> bool:
    """Check an array on the host, one shard at a time, without a program to compile."""
    pieces = (np.asarray(piece.data) for piece in x.addressable_shards if piece.replica_id == 0)
    return all(bool(_good(np, piece, strict)) for piece in pieces)


def _good(numpy: Any, x: Any, strict: bool) -> Any:
    """Return whether an array has no NaN, and with ``strict`` no infinity; ``numpy`` is NumPy or jax.numpy."""
    return numpy.isfinite(x).all() if strict else ~numpy.isnan(x).any()


@functools.partial(jax.jit, static_argnums=1)
def _on_devices(leaves: list[jax.Array], strict: tuple[bool, ...]) -> jax.Array:
    """Check all arrays on the devices: bool (arrays,)."""
    there = [jax.device_put(x, jax.memory.Space.Device) for x in leaves]  # some may be offloaded
    return jnp.stack([_good(jnp, x, each) for x, each in zip(there, strict, strict=True)])
