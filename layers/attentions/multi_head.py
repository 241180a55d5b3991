"""Multi-head attention: each query takes a weighted mean of the values whose keys it matches.

`attention` checks its inputs and calls `ring_attention` if the length is split over a mesh, else `local_attention`.
`MultiHeadAttention` is the layer with its four projections.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sapwood.core.errors import ConfigError, InputError
from sapwood.core.initializers import Initializer, lecun_normal, zeros
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.attentions import ring, ulysses
from sapwood.layers.attentions.one_device import check_and_promote, local_attention
from sapwood.layers.attentions.positions import Rotary
from sapwood.layers.expand_rank import expand_rank
from sapwood.layers.linear.matmul import matmul
from sapwood.parallel.place_activations import activation_sharding, has_mesh


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    sharding: Any = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """`softmax(q k^T * scale) v` for each head; the softmax is computed in float32 or wider.

    Query head n uses key head n // (heads / kv_heads). This is multi-head, grouped-query or multi-query attention.

    If `sharding` splits the length and there is no `mask`, this is `ring_attention`. Otherwise a TPU runs the kernel of
    `splash_attention`, and an NVIDIA GPU in half precision that of `cudnn_attention`, where these support the inputs.

    A non-finite key or value gives NaN for the queries that see it. With `causal` it affects no earlier query, and no
    query at all if `mask` hides it from all. (A kernel and `ring_attention` do not guarantee this: their blocks
    multiply it by 0.)

    Args:
        q: `(batch, queries, heads, head_dim)`. `heads` is a multiple of `kv_heads`.
        k, v: `(batch, keys, kv_heads, head_dim)`.
        mask: boolean, true where a query may see a key; rank 4 and broadcastable to `(batch, heads, queries, keys)`. A
            padding mask is `valid[:, None, None, :]`. A query that may see no key gets the mean of all values.
        causal: whether query i sees only the keys 0 to i.
        scale: factor of the scores, 1 / sqrt(head_dim) by default.
        sharding: the sharding of q on a mesh, if known.
        segments: integers `(batch, length)` for sequences packed into one; a query sees only keys of its own segment.

    Returns:
        An array of the shape of q.

    Raises:
        InputError: the shapes do not fit together.

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762); Ainslie et al. 2023, "GQA" (arXiv:2305.13245).

    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> attention(jnp.zeros_like(x), x, x, causal=True)[0, :, 0, 0]
    Array([0. , 0.5, 1. ], dtype=float32)
    """
    q, k, v, segments = check_and_promote("attention", q, k, v, causal, segments)
    mask = _mask(mask, q, k)
    if mask is None and ring.chosen(k, sharding):
        return ring.ring_attention(q, k, v, causal, scale, sharding, segments)
    return local_attention(q, k, v, mask, causal, scale, sharding, segments)


def _mask(mask: jax.Array | None, q: jax.Array, k: jax.Array) -> jax.Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.dtype != bool or mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True)):
        raise InputError(
            f"attention expects a boolean mask that broadcasts to (batch, heads, queries, keys) = {full}, got "
            f"{describe(mask)}; a padding mask (batch, keys) is given as mask[:, None, None, :]"
        )
    return mask


class MultiHeadAttention(Layer):
    """Attention of a sequence to itself or, with `context`, to another sequence.

    The call takes x `(batch, length, features)` and returns the same shape. Optional arguments are `context`
    `(batch, keys, features_context)`, `mask` and `segments` as in `attention`, and `positions` as in `rotary`. On a
    mesh that splits the length it runs ring attention, or all-to-all attention if the rules ask for it
    (`ulysses.chosen`).

    Parameters, with the logical axes "embed", "heads" and "kv": `query/kernel` (features, heads, head_dim),
    `key/kernel` and `value/kernel` (features_context, kv_heads, head_dim), `out/kernel` (heads, head_dim, features),
    and a `bias` each.

    Args:
        heads: number of query heads.
        head_dim: size of each head, features / heads by default.
        kv_heads: number of key and value heads, `heads` by default. With fewer, groups of query heads share them.
        causal: whether each position sees only itself and earlier ones.
        rotary: rotates queries and keys by their positions; None for no rotation.
        bias: whether each projection adds a bias.
        kernel_init: initializer of the query, key and value kernels.
        out_init: initializer of the output kernel.

    Raises:
        ConfigError: `heads` is no multiple of `kv_heads`.
        InputError: the arrays do not fit, or features do not divide into heads.

    Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245).

    >>> import sapwood as sw
    >>> layer, x = MultiHeadAttention(4, kv_heads=2, causal=True), jnp.ones((1, 5, 8))
    >>> params, _ = sw.init(layer, 0, x)
    >>> params["query"]["kernel"].shape, params["key"]["kernel"].shape, jax.jit(layer)(params, x).shape
    ((8, 4, 2), (8, 2, 2), (1, 5, 8))
    """

    heads: int
    head_dim: int | None = None
    kv_heads: int | None = None
    causal: bool = False
    rotary: Rotary | None = None
    bias: bool = False
    kernel_init: Initializer = lecun_normal(in_axis=0, out_axis=(1, 2))
    out_init: Initializer = lecun_normal(in_axis=(0, 1), out_axis=2)

    def __post_init__(self) -> None:
        check_inputs.positive(
            self, "heads", *(name for name in ("head_dim", "kv_heads") if getattr(self, name) is not None)
        )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError(
                f"MultiHeadAttention: heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )

    def __call__(
        self,
        v: Vars,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("MultiHeadAttention", x))
        check_inputs.rank("MultiHeadAttention", x, "batch", "length", "features")
        head_dim, kv_heads = self._sizes(x)
        source = x if context is None else v.policy.cast(check_inputs.floating("MultiHeadAttention", context))
        check_inputs.rank("MultiHeadAttention", source, "batch", "keys", "features")
        q = self._split(v.query, x, self.heads, head_dim)
        k = self._split(v.key, source, kv_heads, head_dim)
        value = self._split(v.value, source, kv_heads, head_dim)
        if self.rotary is not None:
            if context is not None:
                raise InputError(
                    "MultiHeadAttention: rotary positions are places in one sequence; they cannot be "
                    "used with a context"
                )
            q, k = self.rotary(v.rotary, q, positions), self.rotary(v.rotary, k, positions)
        elif positions is not None:
            raise InputError("MultiHeadAttention: positions are used by rotary= alone, which is None here")
        sharding = activation_sharding(v, q, "batch", "length", "heads", "kv")
        if mask is None and ulysses.chosen(v, q, k, sharding):
            y = ulysses.ulysses_attention(q, k, value, self.causal, sharding=sharding, segments=segments)
        else:
            y = attention(q, k, value, mask, self.causal, sharding=sharding, segments=segments)
        return self._join(v.out, y, x.shape[-1])

    def _sizes(self, x: jax.Array) -> tuple[int, int]:
        if self.head_dim is None and x.shape[-1] % self.heads:
            raise InputError(
                f"MultiHeadAttention: {x.shape[-1]} features do not divide into heads={self.heads}; "
                f"choose another number or give head_dim; x is {describe(x)}"
            )
        return self.head_dim or x.shape[-1] // self.heads, self.kv_heads or self.heads

    def _split(self, v: Vars, x: jax.Array, heads: int, head_dim: int) -> jax.Array:
        """Project `(batch, length, features)` to `(batch, length, heads, head_dim)`."""
        shape = (x.shape[-1], heads, head_dim)
        kernel = v.param("kernel", shape, self.kernel_init, axes=("embed", "heads", "kv"))
        y = matmul(x, kernel, split=has_mesh(v))
        if self.bias:
            y = y + expand_rank(v.param("bias", shape[1:], zeros, axes=("heads", "kv")), y)
        return v.shard(y, "batch", "length", "heads", "kv")

    def _join(self, v: Vars, x: jax.Array, features: int) -> jax.Array:
        """Project `(batch, length, heads, head_dim)` back to `(batch, length, features)`."""
        kernel = v.param("kernel", (*x.shape[2:], features), self.out_init, axes=("heads", "kv", "embed"))
        y = matmul(x, kernel, 2, split=has_mesh(v))
        return y + expand_rank(v.param("bias", (features,), zeros, axes=("embed",)), y) if self.bias else y
