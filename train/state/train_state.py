"""`TrainState`: everything that a run carries from one step to the next, as one pytree.

It is a plain registered dataclass: `flax.struct` gives the same, but costs 0.17 s to import.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import jax

from sapwood.core import migration_hints
from sapwood.core.short_repr import in_brief


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of training. A field that a run does not use is None and holds no array.

    Attributes:
        step: number of batches done.
        params: the model's parameters, a nested dict.
        state: the model's state, a nested dict.
        opt_state: the state of the optax optimizer.
        rng: the key of the run; each step folds its number into it.
        ema: the running means of the trainable parameters (`train.state.ema`).
        ema_state: the running means of the model state.
        scale: the `ScaleState` of loss scaling for float16.
        ok: False from the first step on whose checks failed. From there ``params`` and ``state`` do not change, so the
            host can replay that step later.
        features: what `fit` learned of its data (`sapwood.data.Learned`), to which `evaluate` and `predict` hold
            theirs. It is static, not an array; None if nothing is known.
        stacks: which parameters are stacks of blocks, as the optimizer sees them (`train.blockwise`). It is static too.

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
        """Return a copy of the state with some fields changed."""
        return dataclasses.replace(self, **changes)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise migration_hints.attribute(self, name, migration_hints.STATE)
