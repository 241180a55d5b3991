"""The exponential moving average (EMA) of the trainable parameters and of the model state, which evaluation uses.

Step n keeps ``min(decay, (1 + n) / (10 + n))`` of the old mean. So the first, random parameters are forgotten at once,
and a short run averages over about its last tenth. With a fixed decay of 0.999 the mean would still be two thirds
random after 400 steps. The formula is that of `tf.train.ExponentialMovingAverage(num_updates=)`. (Polyak and Juditsky
1992.)

Batch statistics belong to the parameters that they were taken with. So the mean of the parameters needs the mean of the
statistics, as in timm's ModelEma and TensorFlow's EfficientNet: every floating entry of the model state is averaged
with the same decay. Other entries, such as a count or a key, keep their newest value.

Means are in float32 at least: bfloat16 cannot represent 0.999, so a mean in it would forget nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.paths import leaves, nest, overlay


def first(tree: Any) -> Any:
    """Return the running mean of arrays before the first step: copies in float32 at least."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(np.promote_types(x.dtype, np.float32)), tree)


def averaged_entries(state: dict) -> dict:
    """Return the part of a model state that is averaged: its floating entries.

    >>> averaged_entries({"norm": {"mean": jnp.zeros(2), "count": jnp.int32(3)}})
    {'norm': {'mean': Array([0., 0.], dtype=float32)}}
    """
    return nest((path, x) for path, x in leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))


def decay_of(decay: float, updates: Any) -> jax.Array:
    """Return how much of the mean the next update keeps, if there were ``updates`` updates before it.

    >>> [round(float(decay_of(0.999, n)), 3) for n in (0, 10, 100, 100000)]
    [0.1, 0.55, 0.918, 0.999]
    """
    updates = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def update(mean: Any, tree: Any, keep: jax.Array) -> Any:
    """Return the running mean after one more step, which keeps ``keep`` of the old mean."""
    return jax.tree.map(lambda old, x: keep.astype(old.dtype) * old + (1 - keep).astype(old.dtype) * x, mean, tree)


def eval_variables(state: Any) -> tuple[dict, dict]:
    """Return the parameters and the model state that evaluation uses.

    Entries with a mean are that mean, in the dtype of the entry; other entries are as they are. Also takes a state of
    shapes, and then returns shapes.
    """
    if state.ema is None:
        return state.params, state.state
    return _with_means(state.params, state.ema), _with_means(state.state, state.ema_state)


def _with_means(tree: dict, means: dict) -> dict:
    """Replace the entries of a tree that have a mean by that mean.

    The tree of means decides which entries those are: a trainer with other trainable parameters may have made it.
    """
    there = dict(leaves(tree))
    return overlay(tree, nest((path, _in_dtype_of(there[path], mean)) for path, mean in leaves(means)))


def _in_dtype_of(x: Any, mean: Any) -> Any:
    """Return the running mean of an array in that array's dtype; for shapes, the shape."""
    if mean.dtype == x.dtype:
        return mean
    if isinstance(mean, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(mean.shape, x.dtype, sharding=mean.sharding)
    return mean.astype(x.dtype)
