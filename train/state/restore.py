"""`restore_state`: reads a training state from a checkpoint, also from one of an earlier version.

Checkpoints of versions up to 0.1 differ in the EMA: that of bfloat16 and float16 parameters was saved in their dtype,
and there was none of the model state.
"""

import contextlib
from typing import Any

import jax

from sapwood.core.errors import CheckpointError
from sapwood.saving.checkpoints import Checkpoints, Info
from sapwood.train.state import ema
from sapwood.train.state.train_state import TrainState


def restore_state(
    checkpoints: Checkpoints, shapes: TrainState, step: int | str | None = None
) -> tuple[TrainState, Info]:
    """Read a state from a checkpoint; see `Checkpoints.restore`.

    In a checkpoint of version 0.1 or before, an EMA in bfloat16 or float16 becomes float32, and the EMA of the model
    state starts as the model state.

    Args:
        checkpoints: the checkpoints of the run.
        shapes: the state as shapes, with the dtypes and shardings to read it in.
        step: a step, "best", or None for the newest whole checkpoint.

    Returns:
        The state, and the `Info` of its checkpoint.
    """
    saved = {} if shapes.ema is None else _contents(checkpoints, step)
    older = not any(name.startswith("ema_state/") for name in saved)
    asked = shapes.replace(ema=_as_saved(saved, shapes.ema), ema_state=None if older else shapes.ema_state)
    found, info = checkpoints.restore(asked, step=step)
    mean = jax.tree.map(lambda x, planned: x.astype(planned.dtype), found.ema, shapes.ema)
    of_state = ema.first(ema.averaged_entries(found.state)) if older and shapes.ema is not None else found.ema_state
    return found.replace(ema=mean, ema_state=of_state), info


def _as_saved(saved: dict[str, jax.ShapeDtypeStruct], mean: Any) -> Any:
    """Return the shapes of the EMA in the dtypes that the checkpoint has them in."""

    def as_saved(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        there = saved.get(f"ema/{jax.tree_util.keystr(path, simple=True, separator='/')}", x)
        narrow = str(there.dtype) in ("bfloat16", "float16")
        return jax.ShapeDtypeStruct(x.shape, there.dtype, sharding=x.sharding) if narrow else x

    return jax.tree.map_with_path(as_saved, mean)


def _contents(checkpoints: Checkpoints, step: int | str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of the arrays by path, from the first readable checkpoint that `restore` would try; {} if
    there is none.
    """
    for candidate in checkpoints.order(step):
        with contextlib.suppress(CheckpointError):  # a damaged checkpoint: `restore` warns of it
            return checkpoints.contents(candidate)
    return {}
