"""Attention on an NVIDIA GPU by cuDNN: one kernel, which never holds the (length x length) logits.

`jax.nn.dot_product_attention` has it, but takes it only where it is told to, and then raises for what cuDNN cannot do.
So `chosen` says where it serves, and `local_attention`, its plain version, takes it there. When it pays has not been
measured yet: the rule follows what cuDNN supports.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, Mesh, NamedSharding

from sapwood.parallel.per_device import alone, platform
from sapwood.parallel.place_activations import shards, split_over

LEAST = 128
"""Positions of a sequence, at least: below, the logits are small."""

WIDEST = 128
"""The head_dim, at most: what cuDNN has for every GPU since Ampere, backward too."""


def chosen(q: jax.Array, k: jax.Array, mask: Any = None, segments: Any = None, sharding: Any = None) -> bool:
    """Whether the kernel serves for these arrays: half precision, Ampere or newer, no mask but the causal one.

    ``sharding`` is that of q on a mesh, which may split the batch and the heads, if it splits those of k alike. Without
    one the kernel serves on a single device, and inside a `jax.shard_map` over the whole mesh.

    >>> x = jnp.ones((1, 256, 2, 64))
    >>> chosen(x, x)
    False
    """
    if platform(getattr(sharding, "mesh", None)) not in ("gpu", "cuda", "rocm"):  # whatever the default device is
        return False
    if mask is not None or segments is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if not all(isinstance(n, int) for n in (*q.shape, *k.shape)):  # a symbolic length is none
        return False
    if min(q.shape[1], k.shape[1]) < LEAST or q.shape[3] > WIDEST or _generation(sharding) < 8:
        return False
    return _splits(k, sharding) and _accepted(q, k)


def _generation(sharding: Any) -> int:
    """The GPU we compile for: 8 is Ampere and Ada, 9 Hopper; 0 is no NVIDIA GPU."""
    found = re.fullmatch(r"(\d+)\.\d+", str(getattr(_device(sharding), "compute_capability", "")))
    return int(found[1]) if found else 0


def _device(sharding: Any) -> Any:
    """A device of the mesh; the default one where none is known."""
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    given = jax.config.jax_default_device  # type: ignore[attr-defined]
    return given if hasattr(given, "platform") else jax.local_devices(backend=given)[0]


def _splits(k: jax.Array, sharding: Any) -> bool:
    """Whether the kernel can be split as q is: XLA is told how to split batch and heads, with k and v like q."""
    if sharding is None:
        return jax.device_count() == 1 or alone()
    if not isinstance(sharding, NamedSharding) or AxisType.Manual in sharding.mesh.axis_types:
        return False
    whole_rows = not split_over(sharding, 1) and not split_over(sharding, 3)
    return whole_rows and k.shape[2] % shards(sharding, 2) == 0


def _accepted(q: jax.Array, k: jax.Array) -> bool:
    """Whether JAX finds cuDNN, and it takes these shapes: asking is tracing, and computes nothing."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, k)]
    try:
        jax.eval_shape(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), *shapes)
    except (RuntimeError, ValueError):  # no cuDNN; shapes that it has no kernel for (NotImplementedError is the former)
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
    """`attention` without a mask by cuDNN's kernel: q `(batch, queries, heads, head_dim)` to the same.

    k and v are `(batch, keys, kv_heads, head_dim)`. It has a gradient, but no forward-mode derivative and none of the
    gradient. Under `jax.vmap` all arrays get the mapped dimension in front, as JAX's rule for the kernel wants them.
    The ``implementation`` "xla" computes the same on any platform: that is how what is around the kernel is tested.
    Raises `RuntimeError` where there is no cuDNN, `NotImplementedError` for shapes it has no kernel for.

    Dao 2023, "FlashAttention-2" (arXiv:2307.08691).

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> cudnn_attention(jnp.zeros_like(x), x, x, causal=True, implementation="xla")[0, :, 0, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    q, k, v = _inputs(q, k, v)
    return _output(jax.nn.dot_product_attention(q, k, v, is_causal=causal, scale=scale, implementation=implementation))


@custom_vmap
def _abreast(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays; under `jax.vmap` each is mapped, over its first dimension."""
    return xs


@_abreast.def_vmap
def _mapped(size: int, mapped: Any, *xs: jax.Array) -> Any:
    alike = [x if there else jnp.broadcast_to(x, (size, *x.shape)) for x, there in zip(xs, mapped, strict=True)]
    return _abreast(*alike), (True,) * len(xs)


# `custom_vmap` has no gradient of its own: these two are the identity with one.


@jax.custom_vjp
def _inputs(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    return _abreast(q, k, v)


@jax.custom_vjp
def _output(y: jax.Array) -> jax.Array:
    return y


_inputs.defvjp(lambda *xs: (_abreast(*xs), None), lambda _, gradients: gradients)
_output.defvjp(lambda y: (y, y), lambda y, gradient: (_abreast(gradient, y)[0],))
