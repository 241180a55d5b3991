"""`TrainState`: everything a run carries from one step to the next, as one pytree."""

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import jax

from sapwood.core import migration_hints
from sapwood.core.short_repr import in_brief


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of training. What a run does not use is None and holds no array.

    ``step`` counts batches, ``params`` and ``state`` are the model's nested dicts, ``opt_state`` is optax's, ``rng``
    the run's key (each step folds its number into it), ``ema`` and ``ema_state`` the running means of the parameters
    that train and of the model's state (`train.ema`), ``scale`` the `ScaleState` of float16, and ``ok`` turns false at
    a step whose checks failed: from there on ``params`` and ``state`` stay as they are, so that step can be replayed
    when the host comes to look. ``features`` is what `fit` learned of its data (`sapwood.data.Learned`), to which
    `evaluate` and `predict` hold theirs: a label, no array, and None where nothing is known. ``stacks`` is a label,
    too: which parameters are stacks of blocks, as the optimizer sees them (`train.blockwise`).

    (A plain registered dataclass: `flax.struct` gives the same but costs 0.17 s to import.)

    >>> TrainState(step=0, params={}, state={}, opt_state=(), rng=jax.random.key(0)).replace(step=1).step
    1
    """

    step: Any
    params: dict
    state: dict
    opt_state: Any
    rng: Any
    ema: Any = None
    ema_state: Any = None
    scale: Any = None
    ok: Any = None
    features: Any = dataclasses.field(default=None, metadata={"static": True})
    stacks: Any = dataclasses.field(default=None, metadata={"static": True}, repr=False)

    __repr__ = in_brief

    def replace(self, **changes: Any) -> Self:
        """The same state with some fields changed."""
        return dataclasses.replace(self, **changes)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise migration_hints.attribute(self, name, migration_hints.STATE)
