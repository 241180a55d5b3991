"""A training state from a checkpoint, also from one of an earlier version."""

import contextlib
from typing import Any

import jax

from sapwood.core.errors import CheckpointError
from sapwood.saving.checkpoints import Checkpoints, Info
from sapwood.train.state import ema
from sapwood.train.state.train_state import TrainState


def restored(checkpoints: Checkpoints, shapes: TrainState, step: int | str | None = None) -> tuple[TrainState, Info]:
    """The state of the newest whole checkpoint, of the best ("best"), or of that of ``step``, in these shapes, dtypes
    and shardings; see `Checkpoints.restore`.

    Up to 0.1 a running mean of bfloat16 or float16 parameters was saved in their dtype: it becomes float32. There was
    none of the model's state: it begins with what the state is.
    """
    saved = {} if shapes.ema is None else _contents(checkpoints, step)
    older = not any(name.startswith("ema_state/") for name in saved)
    asked = shapes.replace(ema=_as_saved(saved, shapes.ema), ema_state=None if older else shapes.ema_state)
    found, info = checkpoints.restore(asked, step=step)
    mean = jax.tree.map(lambda x, planned: x.astype(planned.dtype), found.ema, shapes.ema)
    of_state = ema.first(ema.averaged(found.state)) if older and shapes.ema is not None else found.ema_state
    return found.replace(ema=mean, ema_state=of_state), info


def _as_saved(saved: dict[str, jax.ShapeDtypeStruct], mean: Any) -> Any:
    """The shapes of the running mean in the dtypes that the checkpoint has them in, if it can be read."""

    def as_saved(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        there = saved.get(f"ema/{jax.tree_util.keystr(path, simple=True, separator='/')}", x)
        narrow = str(there.dtype) in ("bfloat16", "float16")
        return jax.ShapeDtypeStruct(x.shape, there.dtype, sharding=x.sharding) if narrow else x

    return jax.tree.map_with_path(as_saved, mean)


def _contents(checkpoints: Checkpoints, step: int | str | None) -> dict[str, jax.ShapeDtypeStruct]:
    for candidate in checkpoints.order(step):
        with contextlib.suppress(CheckpointError):  # damaged, which `restore` says
            return checkpoints.contents(candidate)
    return {}
