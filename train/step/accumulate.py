"""Gradient accumulation: one optimizer step from several micro-batches that together are the batch.

Each micro-batch is weighted by what its loss counts (`Mean.weight`: examples, tokens, or the sum of mask and weights).
So the gradient is that of the whole batch, for any distribution of tokens and padding over the micro-batches. Gradients
are summed in float32 at least, for parameters of any dtype. A loss that does not say what it counts is an error
(`forward.hold`). Batch statistics are updated by one micro-batch after the other.

Losses that layers add are means over examples. All micro-batches have the same number of examples, so these losses
count the same in each. They are added to the objective's loss, which is first multiplied by its weight over the mean
weight of the micro-batches; the sum has one gradient. The mean weight is needed before the first gradient, so a first
pass runs over all micro-batches, of which the compiler keeps only what the weights depend on. In this case an objective
of one's own must not divide by its count if that is 0, or the gradient is NaN; `Mean` does not.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.scan import scan
from sapwood.metrics import Mean, Metric
from sapwood.train.step.forward import AUXILIARY, Pass

Gradient = Callable[..., tuple[Any, Pass]]
"""``gradient(trained, model_state, key, batch, ordinary=None) -> (gradients or None, Pass)``; see `forward.forward`."""


def split(batch: Any, n: int) -> Any:
    """Split a batch into ``n`` micro-batches along a new leading axis: example ``i`` goes to micro-batch ``i % n``.

    So the rows of each device are spread over all micro-batches, and no example moves to another device. Raises
    `ConfigError` if ``n`` does not divide the batch.

    >>> split({"x": jnp.arange(4)}, 2)["x"].tolist()
    [[0, 2], [1, 3]]
    """

    def part(x: jax.Array) -> jax.Array:
        if x.ndim == 0 or x.shape[0] % n:
            raise ConfigError(
                f"accumulate={n} does not divide the batch (an entry has shape {x.shape}); take a batch "
                f"size that is a multiple of {n}"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    return jax.tree.map(part, batch)


def accumulate(gradient: Gradient, n: int, plain: Gradient | None = None) -> Gradient:
    """Return a function like ``gradient`` that runs over the ``n`` micro-batches of a batch, one after the other.

    Args:
        gradient: the gradient of one micro-batch.
        n: number of micro-batches.
        plain: the forward pass without a gradient, for the pass that computes the weights; None uses ``gradient``.
    """

    def whole(trained: dict, model_state: dict, key: Any, batch: Any) -> tuple[Any, Pass]:
        def body(carry, xs):
            total, model_state = carry
            i, micro = xs
            grads, out = gradient(trained, model_state, jax.random.fold_in(key, i), micro, *ordinary)
            counts = jnp.float32(1) if ordinary else out.weight
            total = jax.tree.map(lambda t, g: t + _counted(g.astype(t.dtype), counts.astype(t.dtype)), total, grads)
            return (total, out.state), (out._replace(state={}, weight=jnp.asarray(out.weight)), jnp.asarray(counts))

        def weigh(_, xs):
            i, micro = xs
            out = (plain or gradient)(trained, model_state, jax.random.fold_in(key, i), micro)[1]
            return None, jnp.asarray(out.weight)

        micros = split(batch, n)
        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), micros)
        shapes, one = jax.eval_shape(gradient, trained, model_state, key, first)
        ordinary = ()
        if AUXILIARY in one.metrics:
            ordinary = (jnp.mean(scan(weigh, None, (jnp.arange(n), micros), n)[1]),)
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, np.promote_types(g.dtype, np.float32)), shapes)
        (total, model_state), (outs, counts) = scan(body, (zeros, model_state), (jnp.arange(n), micros), n)
        weight = jnp.sum(counts)
        safe = jnp.where(weight == 0, 1, weight)
        grads = jax.tree.map(lambda t, g: (t / safe.astype(t.dtype)).astype(g.dtype), total, shapes)
        loss = jnp.sum(_counted(outs.loss, counts)) / safe
        ok = jax.tree.map(jnp.all, outs.ok)
        return grads, Pass(loss, jnp.sum(outs.weight), _merge(outs.metrics, outs.weight, n), model_state, ok)

    return whole


def _counted(x: jax.Array, weight: Any) -> jax.Array:
    """Return ``x * weight``, and 0 for a weight of 0, even if ``x`` is NaN, as a mean over no examples is."""
    return jnp.where(weight != 0, x * weight, 0)


def _merge(stacked: dict[str, Any], weights: jax.Array, n: int) -> dict[str, Any]:
    """Merge the metrics of ``n`` micro-batches, stacked along the first axis, into those of the whole batch."""

    def one(name: str, value: Any) -> Metric:
        if name == AUXILIARY:
            return Mean(jnp.sum(value), jnp.float32(n))
        if not isinstance(value, Metric):
            return Mean(jnp.sum(_counted(value, weights)), jnp.sum(weights))
        parts = [jax.tree.map(operator.itemgetter(i), value) for i in range(n)]
        return functools.reduce(lambda left, right: left.merge(right), parts)

    return {name: one(name, value) for name, value in stacked.items()}
