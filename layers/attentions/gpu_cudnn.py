"""Attention on an NVIDIA GPU by cuDNN's fused kernel, which never holds the (length x length) logits.

`jax.nn.dot_product_attention` uses the kernel only on request, and then raises for inputs that cuDNN does not support.
So `chosen` tests the inputs first. If it is true, `local_attention` (one_device.py) calls `cudnn_attention`. `chosen`
follows what cuDNN supports; when the kernel is faster has not been measured yet.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, Mesh, NamedSharding

from sapwood.parallel.per_device import is_on_one_device, platform
from sapwood.parallel.place_activations import shards, split_over

LEAST = 128
"""Least number of positions of a sequence. Below it the logits are small."""

WIDEST = 128
"""Largest head_dim: what cuDNN supports on every GPU since Ampere, backward pass included."""


def chosen(q: jax.Array, k: jax.Array, mask: Any = None, segments: Any = None, sharding: Any = None) -> bool:
    """True if cuDNN's kernel should be used: half precision, Ampere or newer, no mask but the causal one.

    `sharding` is that of q on a mesh. It may split the batch and the heads, if the heads of k can be split alike.
    Without a sharding the kernel is used on a single device, and inside a `jax.shard_map` over the whole mesh.

    >>> x = jnp.ones((1, 256, 2, 64))
    >>> chosen(x, x)
    False
    """
    if platform(getattr(sharding, "mesh", None)) not in ("gpu", "cuda", "rocm"):  # of the mesh, if there is one
        return False
    if mask is not None or segments is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if not all(isinstance(n, int) for n in (*q.shape, *k.shape)):  # no symbolic sizes
        return False
    if min(q.shape[1], k.shape[1]) < LEAST or q.shape[3] > WIDEST or _generation(sharding) < 8:
        return False
    return _splits(k, sharding) and _accepted(q, k)


def _generation(sharding: Any) -> int:
    """Major compute capability of the GPU we compile for: 8 is Ampere and Ada, 9 Hopper. 0 for any other device."""
    found = re.fullmatch(r"(\d+)\.\d+", str(getattr(_device(sharding), "compute_capability", "")))
    return int(found[1]) if found else 0


def _device(sharding: Any) -> Any:
    """A device of the mesh, or the default device if none is known."""
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    given = jax.config.jax_default_device  # type: ignore[attr-defined]
    return given if hasattr(given, "platform") else jax.local_devices(backend=given)[0]


def _splits(k: jax.Array, sharding: Any) -> bool:
    """True if XLA can split the kernel over the mesh as `sharding` splits q, or need not split it.

    XLA can split the batch and the heads, if k and v are split like q. So the length and head_dim of q must not be
    split, and the heads of k must divide into as many shards as those of q. Without a sharding XLA need not split the
    kernel on a single device, and inside a `jax.shard_map` over the whole mesh.
    """
    if sharding is None:
        return jax.device_count() == 1 or is_on_one_device()
    if not isinstance(sharding, NamedSharding) or AxisType.Manual in sharding.mesh.axis_types:
        return False
    whole_rows = not split_over(sharding, 1) and not split_over(sharding, 3)
    return whole_rows and k.shape[2] % shards(sharding, 2) == 0


def _accepted(q: jax.Array, k: jax.Array) -> bool:
    """True if JAX finds cuDNN and cuDNN supports these shapes. This traces the call and computes nothing."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, k)]
    try:
        jax.eval_shape(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), *shapes)
    except (RuntimeError, ValueError):  # no cuDNN, or no kernel for these shapes (a NotImplementedError, too)
        return False
    return True


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool = False,
    scale: float | None = None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """`attention` without a mask, by cuDNN's kernel.

    It has a gradient in reverse mode, but no forward-mode derivative and no second derivative. Under `jax.vmap` all
    arrays get the mapped dimension in front, as JAX's batching rule for the kernel requires.

    Args:
        q: `(batch, queries, heads, head_dim)`, float16 or bfloat16 for cuDNN.
        k, v: `(batch, keys, kv_heads, head_dim)`.
        causal: whether query i sees only the keys 0 to i.
        scale: factor of the scores, 1 / sqrt(head_dim) by default.
        implementation: "cudnn", or "xla", which computes the same on any platform, for tests of the code around the
            kernel.

    Returns:
        An array of the shape of q.

    Raises:
        RuntimeError: there is no cuDNN.
        NotImplementedError: cuDNN has no kernel for these shapes.

    Dao 2023, "FlashAttention-2" (arXiv:2307.08691).

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> cudnn_attention(jnp.zeros_like(x), x, x, causal=True, implementation="xla")[0, :, 0, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    q, k, v = _inputs(q, k, v)
    return _output(jax.nn.dot_product_attention(q, k, v, is_causal=causal, scale=scale, implementation=implementation))


@custom_vmap
def _abreast(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """The identity. Under `jax.vmap`, unmapped arrays are broadcast, and all are mapped over their first dimension."""
    return xs


@_abreast.def_vmap
def _mapped(size: int, mapped: Any, *xs: jax.Array) -> Any:
    alike = [x if there else jnp.broadcast_to(x, (size, *x.shape)) for x, there in zip(xs, mapped, strict=True)]
    return _abreast(*alike), (True,) * len(xs)


# `custom_vmap` defines no gradient, so these two identity functions define theirs.


@jax.custom_vjp
def _inputs(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    return _abreast(q, k, v)


@jax.custom_vjp
def _output(y: jax.Array) -> jax.Array:
    return y


_inputs.defvjp(lambda *xs: (_abreast(*xs), None), lambda _, gradients: gradients)
_output.defvjp(lambda y: (y, y), lambda y, gradient: (_abreast(gradient, y)[0],))
