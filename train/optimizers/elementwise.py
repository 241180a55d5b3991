"""`is_elementwise`: recognizes optimizers that treat each number by itself, and so need no `blockwise`.

They are recognized by name. There is no other way: an optimizer may look at a rank, a norm or a path in Python. All
others go through `blockwise`. So a name that is missing here costs time, but never changes a number.
"""

import inspect
from typing import Any

import numpy as np

KNOWN = {
    "add_decayed_weights", "clip", "ema", "identity", "scale", "scale_by_adam", "scale_by_adamax", "scale_by_amsgrad",
    "scale_by_belief", "scale_by_lion", "scale_by_rms", "scale_by_rss", "scale_by_schedule", "scale_by_sign",
    "scale_by_stddev", "scale_by_yogi", "trace",
    "clip_by_global_norm",  # one factor for the whole tree
}  # fmt: skip
"""Functions of optax whose `update` treats each number by itself."""


def is_elementwise(optimizer: Any) -> bool:
    """Return True if an optax transformation is one of `KNOWN`, or a chain of them.

    >>> import optax
    >>> is_elementwise(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    True
    >>> is_elementwise(optax.adamw(1e-3, mask=lambda params: params)), is_elementwise(optax.lamb(1e-3))
    (False, False)
    """
    return _alone(optimizer.update)


def _alone(update: Any) -> bool:
    """Return True if an `update` is made by a function in `KNOWN`, with only functions and scalars in its closure."""
    if not inspect.isfunction(update) or not update.__module__.startswith("optax."):
        return False
    maker, held = update.__qualname__.partition(".")[0], inspect.getclosurevars(update).nonlocals
    if maker == "chain":
        return all(map(_alone, held["update_fns"]))
    if maker == "with_extra_args_support":
        return _alone(held["tx"].update)
    return maker in KNOWN and all(callable(x) or np.ndim(x) == 0 for x in held.values())
