"""Decoder-only transformers: each token is predicted from those before it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sapwood import layers as L
from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars, as_vars
from sapwood.layers import check_inputs
from sapwood.layers.compose import remat
from sapwood.layers.masked_values import leading


class Decoder(Layer):
    """A decoder-only transformer: integer tokens `(batch, length)` to logits `(batch, length, vocabulary)`.

    `depth` blocks of causal attention with rotary positions and a feed-forward part of `mlp` hidden units (4 x width by
    default), each after an RMSNorm and added to what came before; then a last RMSNorm and a head of its own. `gated`
    makes the feed-forward part SwiGLU, `down(silu(gate(x)) * up(x))`, as in Llama; else it is `down(gelu(up(x)))`.
    `experts` makes it a `MixtureOfExperts` with `mlp` hidden units each, `k` of them for a token, none dropped unless
    `capacity` says how many an expert takes; they have no bias, and auxiliary losses balance their load, as in Mixtral.
    `kv_heads` below `heads` is grouped-query attention. `bias` adds one to the feed-forward part and the head. The
    blocks are one `Scan`; `remat` says what of each is computed again in the backward pass: "full", "minimal" or
    another policy of `Remat`.

    `mask` (boolean, (batch,) or (batch, length)) says which rows or tokens there are. The others may be any integers:
    no token sees them, and a mixture has none of them. `segments` (integers from 0 up, (batch, length)) are for
    sequences packed into one: a token sees those of its own.

    `features` and `head` are its two halves, for a loss that never holds the logits of all positions
    (`train.next_token`). Raises `ConfigError` for sizes that cannot be, `InputError` for heads that do not divide the
    width and for tokens that are no `(batch, length)`. Vaswani et al. 2017 (arXiv:1706.03762); Shazeer 2020, "GLU
    Variants Improve Transformer" (arXiv:2002.05202); Touvron et al. 2023, "LLaMA" (arXiv:2302.13971); Jiang et al.
    2024, "Mixtral of Experts" (arXiv:2401.04088).

    >>> import jax.numpy as jnp, sapwood as sw
    >>> model, tokens = Decoder(vocabulary=10, depth=2, width=8, heads=2), jnp.zeros((1, 5), int)
    >>> params, _ = sw.init(model, 0, tokens)
    >>> params["blocks"]["gate"]["kernel"].shape, jax.jit(model)(params, tokens).shape
    ((2, 8, 32), (1, 5, 10))
    """

    mask_of_rows = True  # whole rows need no segments, for which there are fewer kernels

    vocabulary: int
    depth: int
    width: int
    heads: int
    mlp: int | None = None
    kv_heads: int | None = None
    gated: bool = True
    bias: bool = False
    dropout: float = 0.0
    remat: str | Callable | None = None
    experts: int | None = None
    k: int = 2
    capacity: float | None = None

    def __post_init__(self):
        given = (name for name in ("mlp", "kv_heads") if getattr(self, name) is not None)
        check_inputs.positive(self, "vocabulary", "depth", "width", "heads", *given)
        check_inputs.within(self, "dropout", 0, 1)
        remat.policy(self.remat)
        if self.experts is not None:
            self._mixture()  # says what is wrong with experts, k and capacity
        elif (self.k, self.capacity) != (2, None):
            raise ConfigError(f"Decoder: k={self.k} and capacity={self.capacity} are of a mixture; give experts, too")

    def __call__(
        self, v: Vars, tokens: jax.Array, *, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        logits = self._logits(v.logits, self.features(v, tokens, mask=mask, segments=segments))
        return v.shard(logits, "batch", "length", "vocab")

    def features(
        self, v: Vars, tokens: jax.Array, *, mask: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """What the head reads: tokens `(batch, length)`, mask and segments to `(batch, length, width)`."""
        v, tokens = as_vars(v, self), jnp.asarray(tokens)
        check_inputs.rank("Decoder", tokens, "batch", "length")
        if mask is not None:
            mask = leading("Decoder", mask, tokens[..., None])[..., 0]
            if mask.shape == tokens.shape:  # padding is a segment of its own; whole rows do not see each other anyway
                segments = jnp.where(mask, 0 if segments is None else segments, -1)
            mask = jnp.broadcast_to(mask, tokens.shape)
            tokens = jnp.where(mask, tokens, 0)
        x = L.Embed(self.vocabulary, self.width)(v.embed, tokens)
        x = v.shard(v.policy.cast(x), "batch", "length", "embed")
        x = L.Scan(self._block, self.depth, remat=self.remat, batched=True)(v.blocks, x, segments, mask)
        return L.RMSNorm()(v.norm, x)

    def head(self, v: Vars) -> tuple[jax.Array, jax.Array | None]:
        """What makes logits of features: the kernel `(width, vocabulary)`, and the bias `(vocabulary,)` or None."""
        v, head = as_vars(v, self).logits, self._logits
        assert head.axes is not None
        kernel = v.param("kernel", (self.width, self.vocabulary), head.kernel_init, axes=head.axes)
        bias = v.param("bias", (self.vocabulary,), head.bias_init, axes=head.axes[1:]) if self.bias else None
        return kernel, bias

    @property
    def _logits(self) -> L.Dense:
        return L.Dense(self.vocabulary, self.bias, ("embed", "vocab"))

    def _block(self, v: Vars, x: jax.Array, segments: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        attention = L.MultiHeadAttention(self.heads, kv_heads=self.kv_heads, causal=True, rotary=L.Rotary())
        y = attention(v.attention, L.RMSNorm()(v.norm1, x), segments=segments)
        x = v.shard(x + L.Dropout(self.dropout)(v.drop1, y), "batch", "length", "embed")
        y = self._feed_forward(v, L.RMSNorm()(v.norm2, x), mask)
        x = x + L.Dropout(self.dropout)(v.drop2, y)
        return v.shard(x, "batch", "length", "embed")

    @property
    def _hidden(self) -> int:
        return self.mlp or 4 * self.width

    def _mixture(self) -> L.MixtureOfExperts:
        assert self.experts is not None
        activation = jax.nn.silu if self.gated else jax.nn.gelu
        return L.MixtureOfExperts(self.experts, self._hidden, self.k, self.capacity, self.gated, activation)

    def _feed_forward(self, v: Vars, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        if self.experts is not None:
            return self._mixture()(v.experts, x, mask)

        def wide(v: Vars) -> jax.Array:
            h = L.Dense(self._hidden, self.bias, ("embed", "mlp"))(v, x)
            return v.shard(h, "batch", "length", "mlp")

        h = jax.nn.silu(wide(v.gate)) * wide(v.up) if self.gated else jax.nn.gelu(wide(v.up))
        return L.Dense(self.width, self.bias, ("mlp", "embed"))(v.down, h)
