"""The cross-entropy of a linear head without its logits: chunk by chunk, the gradient made in the forward pass.

The logits of a large vocabulary are the largest array of a language model's step: 64 x 2,048 tokens of 32,000 classes
are 16 GiB in float32, and a softmax with its gradient holds them several times. Here a chunk of them is made, used for
the loss and both gradients, and forgotten (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009; Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989).
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
"""How many logits are held at once on each device: 128 MiB in float32."""

Names = tuple[str, ...]


class LinearCrossEntropy(NamedTuple):
    """``total`` is what is differentiated; ``losses`` and ``hits`` (best class is the label) are for metrics alone."""

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
    """The sum of ``weight * cross_entropy(softmax(x @ kernel + bias), labels)``, and each of its terms.

    Takes x `(batch, length, features)`, kernel `(features, classes)`, labels and weight `(batch, length)` and bias
    `(classes,)`; gives a float32 scalar, float32 losses and boolean hits `(batch, length)`. The total has gradients in
    x, kernel and bias alone. Logits, softmax and sums are float32. A position of weight zero does not count.

    ``chunk`` positions of the length are done at a time, by default as many as make `ELEMENTS` logits. On a mesh,
    ``sharding`` is that of the logits `(batch, length, classes)` that are never made whole: each device has its own
    examples, positions and classes. For each chunk the devices of other classes agree on the largest logit and on the
    sum of exponentials, one number a position each; the kernel's gradient is summed over a device's own positions and
    meets the others' once. Without it they would meet after every chunk. (Vocabulary parallelism: Shoeybi et al. 2019,
    "Megatron-LM", arXiv:1909.08053.) Raises `DataError` for shapes that do not fit or that the mesh does not divide.

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
    for dim, (size, what) in enumerate(zip(shape, ("examples", "positions", "classes"), strict=True)):
        if size % (n := shards(sharding, dim)):
            axes = ",".join(split_over(sharding, dim))
            raise DataError(
                f"linear_cross_entropy: {size} {what} do not divide over {n} devices of mesh axis {axes}; take "
                f"{size + -size % n}, or leave dimension {dim} of the sharding whole"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(chunk: Any, sharding: Any, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> LinearCrossEntropy:
    return _everywhere(chunk, sharding, False, x, kernel, bias, labels, weight)[0]


def _forward(chunk: Any, sharding: Any, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> tuple[Any, Any]:
    return _everywhere(chunk, sharding, True, x, kernel, bias, labels, weight)


def _backward(chunk: Any, sharding: Any, gradients: Any, cotangent: LinearCrossEntropy) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangent.total).astype(g.dtype), gradients)
    return *scaled, None, None


_summed.defvjp(_forward, _backward)


def _everywhere(chunk: int | None, sharding: NamedSharding | None, train: bool, *arrays: Any) -> tuple[Any, Any]:
    """`_local` on each device's examples, positions and classes, and the sums over the devices."""
    batch, length, classes = (split_over(sharding, dim) for dim in range(3))
    if sharding is None or not (batch or length or classes):
        return _local(chunk, train, (), *arrays)
    tokens = (*batch, *length)  # the mesh axes whose devices have other positions
    scatter = arrays[1].shape[0] % math.prod(sharding.mesh.shape[axis] for axis in tokens) == 0

    def local(*arrays: Any) -> tuple[Any, Any]:
        (total, losses, hits), gradients = _local(chunk, train, classes, *arrays)
        if train and tokens:
            dx, dkernel, dbias = gradients
            if scatter:  # each keeps the rows that it will store, as FSDP does
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
    """The loss of a device's positions, and while training its gradients, by a loop over pieces of the length.

    ``names`` are the mesh axes whose devices have the other classes.
    """
    batch, length = labels.shape
    chunk = min(chunk or max(1, ELEMENTS // (batch * kernel.shape[1])), length)
    steps = -(-length // chunk)
    chunk = -(-length // steps)  # as even as can be
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
    if train and names:  # what x adds to the logits of all classes
        dx = [lax.psum(dx[0], names)]
    gradients = (*dx, carry[1].astype(kernel.dtype), carry[2].astype(bias.dtype)) if train else ()
    return LinearCrossEntropy(carry[0], losses, hits), gradients


def _chunk(train: bool, names: Names, kernel: Any, bias: Any, x: Any, labels: Any, weight: Any) -> tuple[Any, ...]:
    """Losses and hits (batch, chunk) of one piece; while training the gradients of x, kernel and bias too.

    Labels count from the first class of this device: those of other devices are out of its range.
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
        best = lax.pmin(candidate, names) - first  # of equals the first
    loss = (top + jnp.log(norm))[..., 0] - wanted
    hit = best == labels
    if not train:
        return loss, hit
    slope = jnp.where(weight[..., None] != 0, (exp / norm - right.astype(jnp.float32)) * weight[..., None], 0)
    narrow, x = slope.astype(x.dtype), jnp.where(weight[..., None] != 0, x, 0)  # both, as 0 x inf is no 0
    dx = jnp.einsum("blc,fc->blf", narrow, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
    dkernel = jnp.einsum("blf,blc->fc", x, narrow, preferred_element_type=jnp.float32)
    return loss, hit, dx, dkernel, jnp.sum(slope, (0, 1))
