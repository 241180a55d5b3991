"""Cross-entropy of a linear head, computed in chunks so that the logits of the whole batch never exist.

The logits of a large vocabulary are the largest array of a language model's step: 64 x 2,048 tokens of 32,000 classes
are 16 GiB in float32, and a softmax with its gradient holds them several times. Here the forward pass computes the
logits of one chunk of positions, uses them for the loss and the gradients, and discards them. The backward pass only
multiplies the stored gradients by the cotangent of the total. (Wijmans et al. 2024, "Cut Your Losses in
Large-Vocabulary Language Models", arXiv:2411.09009; Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.)
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.errors import DataError
from sapwood.metrics import wide
from sapwood.parallel.per_device import per_device
from sapwood.parallel.place_activations import shards, split_over

ELEMENTS = 2**25
"""Logits that each device holds at once, by default: 128 MiB in float32."""

Names = tuple[str, ...]


class LinearCrossEntropy(NamedTuple):
    """The result of `linear_cross_entropy`. Only ``total`` can be differentiated; the others are for metrics.

    Attributes:
        total: the weighted sum of the losses, a float32 scalar.
        losses: the cross-entropy of each position, float32 `(batch, length)`.
        hits: whether the class with the largest logit is the label, bool `(batch, length)`.
    """

    total: jax.Array
    losses: jax.Array
    hits: jax.Array


def linear_cross_entropy(
    x: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    weight: jax.Array | None = None,
    *,
    chunk: int | None = None,
    sharding: NamedSharding | None = None,
) -> LinearCrossEntropy:
    """The sum of ``weight * cross_entropy(softmax(x @ kernel + bias), labels)``, and its terms.

    Logits, softmax and sums are float32. The total has gradients with respect to x, kernel and bias only. A position
    of weight 0 adds nothing to the total or the gradients.

    On a mesh, each device computes the logits of its own examples, positions and classes. If the classes are split over
    devices, these devices exchange a few numbers for each position of each chunk: the largest logit, the sum of
    exponentials, the logit of the label and the predicted class. The kernel's gradient is summed over a device's own
    positions and reduced over the devices once, at the end; without ``sharding`` it would be reduced after every chunk.
    (Vocabulary parallelism: Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.)

    Args:
        x: the inputs of the head, `(batch, length, features)`.
        kernel: `(features, classes)`.
        labels: integer classes, `(batch, length)`.
        bias: `(classes,)`; None is a bias of 0.
        weight: the weight of each position's loss, a mask or numbers, `(batch, length)`; None is 1 for all.
        chunk: the size of a chunk along the length. None takes the largest size with at most `ELEMENTS` logits in a
            chunk on each device, but at least 1.
        sharding: the sharding that the logits `(batch, length, classes)` would have on a mesh.

    Raises:
        DataError: shapes do not fit together, or the mesh does not divide the batch, the length or the classes.

    >>> x, labels = jnp.zeros((1, 2, 3)), jnp.array([[0, 1]])
    >>> out = linear_cross_entropy(x, jnp.ones((3, 4)), labels)
    >>> round(float(out.total), 4), out.hits.tolist()
    (2.7726, [[True, False]])
    """
    shapes = [x.shape, kernel.shape, labels.shape, *(a.shape for a in (bias, weight) if a is not None)]
    if x.ndim != 3 or kernel.ndim != 2 or x.shape[2] != kernel.shape[0] or labels.shape != x.shape[:2]:
        raise DataError(
            "linear_cross_entropy expects x (batch, length, features), kernel (features, classes) and labels "
            f"(batch, length), got {', '.join(map(str, shapes))}"
        )
    bias = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    weight = jnp.ones(labels.shape, jnp.float32) if weight is None else weight.astype(jnp.float32)
    if bias.shape != kernel.shape[1:] or weight.shape != labels.shape:
        raise DataError(f"linear_cross_entropy: bias (classes,) and weight (batch, length) are expected, got {shapes}")
    _divides((*labels.shape, kernel.shape[1]), sharding)
    return _summed(chunk, sharding, x, kernel, bias, wide(labels), weight)


def _divides(shape: tuple[int, ...], sharding: NamedSharding | None) -> None:
    """Raise `DataError` unless the sharding divides each dimension of `(batch, length, classes)`."""
    for dim, (size, what) in enumerate(zip(shape, ("examples", "positions", "classes"), strict=True)):
        if size % (n := shards(sharding, dim)):
            axes = ",".join(split_over(sharding, dim))
            raise DataError(
                f"linear_cross_entropy: {size} {what} do not divide over {n} devices of mesh axis {axes}; take "
                f"{size + -size % n}, or leave dimension {dim} of the sharding whole"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(chunk: Any, sharding: Any, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> LinearCrossEntropy:
    """`linear_cross_entropy` of checked arguments. Outside differentiation it computes no gradients."""
    return _everywhere(chunk, sharding, False, x, kernel, bias, labels, weight)[0]


def _forward(chunk: Any, sharding: Any, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> tuple[Any, Any]:
    """The forward pass of the custom gradient. Its residuals are the finished gradients of x, kernel and bias."""
    return _everywhere(chunk, sharding, True, x, kernel, bias, labels, weight)


def _backward(chunk: Any, sharding: Any, gradients: Any, cotangent: LinearCrossEntropy) -> tuple[Any, ...]:
    """The backward pass: the gradients times the cotangent of the total. Labels and weight have no gradient."""
    scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangent.total).astype(g.dtype), gradients)
    return *scaled, None, None


_summed.defvjp(_forward, _backward)


def _everywhere(chunk: int | None, sharding: NamedSharding | None, train: bool, *arrays: Any) -> tuple[Any, Any]:
    """Run `_local` on each device's shard of the arrays, and sum the total and the gradients over the devices.

    Returns the `LinearCrossEntropy` and, while training, the gradients of x, kernel and bias.
    """
    batch, length, classes = (split_over(sharding, dim) for dim in range(3))
    if sharding is None or not (batch or length or classes):
        return _local(chunk, train, (), *arrays)
    tokens = (*batch, *length)  # the mesh axes that the positions are split over
    scatter = arrays[1].shape[0] % math.prod(sharding.mesh.shape[axis] for axis in tokens) == 0

    def local(*arrays: Any) -> tuple[Any, Any]:
        (total, losses, hits), gradients = _local(chunk, train, classes, *arrays)
        if train and tokens:
            dx, dkernel, dbias = gradients
            if scatter:  # each device keeps only the rows that it stores under FSDP
                dkernel = lax.psum_scatter(dkernel, tokens, scatter_dimension=0, tiled=True)
            else:
                dkernel = lax.psum(dkernel, tokens)
            gradients = dx, dkernel, lax.psum(dbias, tokens)
        return LinearCrossEntropy(lax.psum(total, tokens) if tokens else total, losses, hits), gradients

    each, columns = PartitionSpec(batch or None, length or None), PartitionSpec(classes or None)
    kernel = PartitionSpec(None, classes or None)
    summed = PartitionSpec(tokens or None, classes or None) if scatter else kernel
    outs = LinearCrossEntropy(*cast(Any, (PartitionSpec(), each, each))), (each, summed, columns) if train else ()
    return per_device(local, sharding.mesh, (each, kernel, columns, each, each), outs)(*arrays)


def _local(
    chunk: int | None, train: bool, names: Names, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any
) -> tuple[Any, Any]:
    """The `LinearCrossEntropy` of one device's positions, by a scan over chunks of the length, and the gradients.

    The gradients are those of x, kernel and bias if ``train`` is True, else an empty tuple. ``names`` are the mesh axes
    that the classes are split over.
    """
    batch, length = labels.shape
    chunk = min(chunk or max(1, ELEMENTS // (batch * kernel.shape[1])), length)
    steps = -(-length // chunk)
    chunk = -(-length // steps)  # chunks of equal length, to reduce the padding
    if names:
        labels = labels.astype(jnp.int32) - lax.axis_index(names) * kernel.shape[1]

    def pieces(a: Any) -> Any:  # (steps, batch, chunk, ...)
        padded = jnp.pad(a, [(0, 0), (0, steps * chunk - length), *[(0, 0)] * (a.ndim - 2)])
        return padded.reshape(batch, steps, chunk, *a.shape[2:]).swapaxes(0, 1)

    def whole(a: Any) -> Any:
        return a.swapaxes(0, 1).reshape(batch, steps * chunk, *a.shape[3:])[:, :length]

    def body(carry: Any, piece: Any) -> tuple[Any, Any]:
        loss, hit, *gradient = _chunk(train, names, kernel, bias, *piece)
        w = piece[2]
        total = carry[0] + jnp.sum(jnp.where(w != 0, loss * w, 0))
        if not train:
            return (total,), (loss, hit)
        dx, dkernel, dbias = gradient
        return (total, carry[1] + dkernel, carry[2] + dbias), (loss, hit, dx)

    carry = [jnp.zeros((), jnp.float32)]
    if train:
        carry += [jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32)]
    carry, ys = lax.scan(body, tuple(carry), tuple(map(pieces, (x, labels, weight))))
    losses, hits, *dx = map(whole, ys)
    if train and names:  # dx is a sum over the classes of all devices
        dx = [lax.psum(dx[0], names)]
    gradients = (*dx, carry[1].astype(kernel.dtype), carry[2].astype(bias.dtype)) if train else ()
    return LinearCrossEntropy(carry[0], losses, hits), gradients


def _chunk(train: bool, names: Names, kernel: Any, bias: Any, x: Any, labels: Any, weight: Any) -> tuple[Any, ...]:
    """Losses and hits (batch, chunk) of one chunk. If ``train`` is True, also the gradients of x, kernel and bias.

    Labels are relative to the first class of this device, so labels of other devices' classes match no class here.
    """
    logits = (
        jnp.einsum("blf,fc->blc", x, kernel, preferred_element_type=jnp.float32) + bias.astype(jnp.float32)[None, None]
    )
    right = lax.broadcasted_iota(labels.dtype, logits.shape, 2) == labels[..., None]
    highest = jnp.max(logits, -1, keepdims=True)
    top = lax.pmax(highest, names) if names else highest
    exp = jnp.exp(logits - top)
    norm, wanted = jnp.sum(exp, -1, keepdims=True), jnp.sum(jnp.where(right, logits, 0), -1)
    best = jnp.argmax(logits, -1).astype(labels.dtype)
    if names:
        norm, wanted = lax.psum((norm, wanted), names)
        first = lax.axis_index(names) * kernel.shape[1]
        candidate = jnp.where((highest == top)[..., 0], first + best, jnp.iinfo(jnp.int32).max)
        best = lax.pmin(candidate, names) - first  # the first class of those with equal logits, as argmax
    loss = (top + jnp.log(norm))[..., 0] - wanted
    hit = best == labels
    if not train:
        return loss, hit
    slope = jnp.where(weight[..., None] != 0, (exp / norm - right.astype(jnp.float32)) * weight[..., None], 0)
    narrow, x = slope.astype(x.dtype), jnp.where(weight[..., None] != 0, x, 0)  # mask both: 0 * inf is NaN
    dx = jnp.einsum("blc,fc->blf", narrow, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
    dkernel = jnp.einsum("blf,blc->fc", x, narrow, preferred_element_type=jnp.float32)
    return loss, hit, dx, dkernel, jnp.sum(slope, (0, 1))
