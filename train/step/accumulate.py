"""Gradient accumulation: one optimizer step from several micro-batches that together are the batch.

Micro-batches count by what their loss counts (`Mean.weight`: examples, tokens, or the sum of mask and weights), so the
gradient is that of the whole batch however tokens and padding fall, and it is summed in float32 at least, whatever the
parameters are. A loss that does not say what it counts is refused (`forward.hold`). Batch statistics are those of the
micro-batches, one after the other.

What layers add is a mean over examples, of which micro-batches have the same number, so it counts the same in each. The
two are one scalar with one gradient, in which the loss counts by its weight over the mean weight. That is known
beforehand only by a first look at all micro-batches, of which the compiler keeps what their weights depend on. So here
an objective of one's own must not divide by what it has counted where that is nothing; `Mean` does not.
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
    """A batch as ``n`` micro-batches along a new leading axis: example ``i`` goes to micro-batch ``i % n``.

    So the rows that a device holds become its rows of every micro-batch, and no example moves. Raises `ConfigError`
    where ``n`` does not divide the batch.

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
    """The same gradient taken over ``n`` micro-batches, one after the other; ``plain`` is the pass without one."""

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
    """``x * weight``; what weighs nothing is 0, also where a mean over nothing was NaN."""
    return jnp.where(weight != 0, x * weight, 0)


def _merge(stacked: dict[str, Any], weights: jax.Array, n: int) -> dict[str, Any]:
    """The metrics of the whole batch from those of its micro-batches, stacked along the first axis."""

    def one(name: str, value: Any) -> Metric:
        if name == AUXILIARY:
            return Mean(jnp.sum(value), jnp.float32(n))
        if not isinstance(value, Metric):
            return Mean(jnp.sum(_counted(value, weights)), jnp.sum(weights))
        parts = [jax.tree.map(operator.itemgetter(i), value) for i in range(n)]
        return functools.reduce(lambda left, right: left.merge(right), parts)

    return {name: one(name, value) for name, value in stacked.items()}
