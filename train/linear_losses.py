"""The cross-entropy of a linear head without its logits: chunk by chunk, the gradient made in the forward pass.

The logits of a large vocabulary are the largest array of a language model's step: 64 x 2,048 tokens of 32,000 classes
are 16 GiB in float32, and a softmax with its gradient holds them several times. Here a chunk of them is made, used for
the loss and both gradients, and forgotten (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009; Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.errors import DataError

ELEMENTS = 2**25
"""How many logits are held at once on each device: 128 MiB in float32."""


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
    ``sharding`` is that of x, split over the batch: each device then sums the kernel's gradient over its own examples
    and they meet once; without it they would meet after every chunk. Raises `DataError` for shapes that do not fit.

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
    return _summed(chunk, sharding, x, kernel, bias, labels, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(chunk: Any, sharding: Any, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> LinearCrossEntropy:
    return _everywhere(chunk, sharding, False, x, kernel, bias, labels, weight)[0]


def _forward(chunk: Any, sharding: Any, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> tuple[Any, Any]:
    return _everywhere(chunk, sharding, True, x, kernel, bias, labels, weight)


def _backward(chunk: Any, sharding: Any, gradients: Any, cotangent: LinearCrossEntropy) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: (g * cotangent.total).astype(g.dtype), gradients)
    return *scaled, None, None


_summed.defvjp(_forward, _backward)


def _everywhere(chunk: int | None, sharding: NamedSharding | None, train: bool, *arrays: Any) -> tuple[Any, Any]:
    """`_local` on each shard of the batch, and the sums over the shards."""
    batch = None if sharding is None or not sharding.spec else sharding.spec[0]
    if sharding is None or not batch:
        return _local(chunk, train, *arrays)
    axes = (batch,) if isinstance(batch, str) else tuple(batch)
    shards = math.prod(sharding.mesh.shape[axis] for axis in axes)
    scatter = arrays[1].shape[0] % shards == 0

    def local(*arrays: Any) -> tuple[Any, Any]:
        (total, losses, hits), gradients = _local(chunk, train, *arrays)
        if train:
            dx, dkernel, dbias = gradients
            if scatter:  # each keeps the rows that it will store, as FSDP does
                dkernel = lax.psum_scatter(dkernel, axes, scatter_dimension=0, tiled=True)
            else:
                dkernel = lax.psum(dkernel, axes)
            gradients = dx, dkernel, lax.psum(dbias, axes)
        return LinearCrossEntropy(lax.psum(total, axes), losses, hits), gradients

    split, whole = PartitionSpec(axes), PartitionSpec()
    sums: Any = (whole, split, split)
    gradients = (split, split if scatter else whole, whole) if train else ()
    return jax.shard_map(
        local, mesh=sharding.mesh, axis_names=set(axes), check_vma=False,
        in_specs=(split, whole, whole, split, split), out_specs=(LinearCrossEntropy(*sums), gradients),
    )(*arrays)  # fmt: skip


def _local(chunk: int | None, train: bool, x: Any, kernel: Any, bias: Any, labels: Any, weight: Any) -> tuple[Any, Any]:
    """The loss of whole arrays, and while training its gradients, by a loop over pieces of the length."""
    batch, length = labels.shape
    chunk = min(chunk or max(1, ELEMENTS // (batch * kernel.shape[1])), length)
    steps = -(-length // chunk)
    chunk = -(-length // steps)  # as even as can be

    def pieces(a: Any) -> Any:  # (steps, batch, chunk, ...)
        padded = jnp.pad(a, [(0, 0), (0, steps * chunk - length), *[(0, 0)] * (a.ndim - 2)])
        return padded.reshape(batch, steps, chunk, *a.shape[2:]).swapaxes(0, 1)

    def whole(a: Any) -> Any:
        return a.swapaxes(0, 1).reshape(batch, steps * chunk, *a.shape[3:])[:, :length]

    def body(carry: Any, piece: Any) -> tuple[Any, Any]:
        loss, hit, *gradient = _chunk(train, kernel, bias, *piece)
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
    gradients = (*dx, carry[1].astype(kernel.dtype), carry[2].astype(bias.dtype)) if train else ()
    return LinearCrossEntropy(carry[0], losses, hits), gradients


def _chunk(train: bool, kernel: Any, bias: Any, x: Any, labels: Any, weight: Any) -> tuple[Any, ...]:
    """Losses and hits (batch, chunk) of one piece; while training the gradients of x, kernel and bias too."""
    logits = jnp.einsum("blf,fc->blc", x, kernel, preferred_element_type=jnp.float32) + bias.astype(jnp.float32)
    right = lax.broadcasted_iota(labels.dtype, logits.shape, 2) == labels[..., None]
    top = jnp.max(logits, -1, keepdims=True)
    exp = jnp.exp(logits - top)
    norm = jnp.sum(exp, -1, keepdims=True)
    loss = (top + jnp.log(norm))[..., 0] - jnp.sum(jnp.where(right, logits, 0), -1)
    hit = jnp.argmax(logits, -1).astype(labels.dtype) == labels
    if not train:
        return loss, hit
    slope = jnp.where(weight[..., None] != 0, (exp / norm - right) * weight[..., None], 0)
    narrow = slope.astype(x.dtype)
    dx = jnp.einsum("blc,fc->blf", narrow, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
    dkernel = jnp.einsum("blf,blc->fc", x, narrow, preferred_element_type=jnp.float32)
    return loss, hit, dx, dkernel, jnp.sum(slope, (0, 1))
