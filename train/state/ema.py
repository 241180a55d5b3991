"""The running mean of what trains, which evaluation uses: of the parameters, and of the model's state beside them.

Step n leaves ``min(decay, (1 + n) / (10 + n))`` of what the mean was. So it forgets the first, random parameters at
once and averages over about the last tenth of a short run, where a fixed 0.999 would still be two thirds random after
400 steps; the formula is that of `tf.train.ExponentialMovingAverage(num_updates=)`. (Polyak and Juditsky 1992.)

Batch statistics belong to the parameters that they were taken with. The mean of the parameters therefore runs with the
mean of the statistics, as in timm's ModelEma and TensorFlow's EfficientNet: every floating entry of the state is
averaged by the same decay. What is no such number, a count or a key, stays the newest.

Means are in float32 at least: bfloat16 has no 0.999, and would forget nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.paths import leaves, nest, overlay


def first(tree: Any) -> Any:
    """The running mean of arrays before the first step."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(np.promote_types(x.dtype, np.float32)), tree)


def averaged(state: dict) -> dict:
    """The part of a model's state that is averaged.

    >>> averaged({"norm": {"mean": jnp.zeros(2), "count": jnp.int32(3)}})
    {'norm': {'mean': Array([0., 0.], dtype=float32)}}
    """
    return nest((path, x) for path, x in leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))


def decay_of(decay: float, updates: Any) -> jax.Array:
    """How much of the mean is kept, after so many updates before this one.

    >>> [round(float(decay_of(0.999, n)), 3) for n in (0, 10, 100, 100000)]
    [0.1, 0.55, 0.918, 0.999]
    """
    updates = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def moved(mean: Any, tree: Any, keep: jax.Array) -> Any:
    """The running mean after one more step."""
    return jax.tree.map(lambda old, x: keep.astype(old.dtype) * old + (1 - keep).astype(old.dtype) * x, mean, tree)


def variables(state: Any) -> tuple[dict, dict]:
    """The parameters and model state that evaluation uses: the means in the dtypes of what they are means of, and what
    is not averaged as it is. For shapes, their shapes."""
    if state.ema is None:
        return state.params, state.state
    return _with_means(state.params, state.ema), _with_means(state.state, state.ema_state)


def _with_means(tree: dict, means: dict) -> dict:
    """The tree with the means of what has one, whichever trainer took them."""
    there = dict(leaves(tree))
    return overlay(tree, nest((path, _in_dtype_of(there[path], mean)) for path, mean in leaves(means)))


def _in_dtype_of(x: Any, mean: Any) -> Any:
    """The running mean of an array, or its shape, in the array's dtype."""
    if mean.dtype == x.dtype:
        return mean
    if isinstance(mean, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(mean.shape, x.dtype, sharding=mean.sharding)
    return mean.astype(x.dtype)
