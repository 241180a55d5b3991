"""Decoder-only transformers: each token is predicted from those before it.

`Decoder` is the model. Its blocks are one `Scan`, so they are traced once, and run as a pipeline on a mesh with stages.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sapwood import layers as L
from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars, as_vars
from sapwood.layers import check_inputs
from sapwood.layers.compose import remat
from sapwood.layers.masked_values import broadcast_leading_mask


class Decoder(Layer):
    """A decoder-only transformer: integer tokens `(batch, length)` to logits `(batch, length, vocabulary)`.

    Each of the `depth` blocks has causal attention with rotary positions and a feed-forward part. Each of the two
    follows an RMSNorm and is added to its input. A last RMSNorm and a head with its own kernel follow. The blocks are
    one `Scan`.

    The call takes an optional `mask` (boolean, (batch,) or (batch, length)), true for real rows or tokens. The others
    may be any integers: no token sees them, and no expert takes them. `segments` (integers from 0 up, (batch, length))
    are for sequences packed into one: a token sees only those of its own segment.

    `features` and `head` are the two halves of the model, for a loss that never holds the logits of all positions
    (`train.next_token`).

    Args:
        vocabulary: number of token ids.
        depth: number of blocks.
        width: features of each token.
        heads: number of attention heads, which must divide the width.
        mlp: hidden units of the feed-forward part, 4 x width by default.
        kv_heads: number of key and value heads, `heads` by default. Fewer are grouped-query attention.
        gated: True makes the feed-forward part SwiGLU, `down(silu(gate(x)) * up(x))`, as in Llama. False makes it
            `down(gelu(up(x)))`.
        bias: whether the feed-forward part and the head add a bias.
        dropout: rate of dropout after attention and after the feed-forward part.
        remat: what each block recomputes in the backward pass: "full", "minimal" or another policy of `Remat`. None:
            see `Scan`.
        experts: a number makes the feed-forward part a `MixtureOfExperts` with `mlp` hidden units each and no bias,
            whose auxiliary losses balance the load, as in Mixtral.
        k: experts of each token.
        capacity: None drops no token; a number limits how many tokens an expert takes, see `MixtureOfExperts`.

    Raises:
        ConfigError: a size is invalid, or `k` or `capacity` is set without `experts`.
        InputError: the heads do not divide the width, or the tokens are not `(batch, length)`.

    Vaswani et al. 2017 (arXiv:1706.03762); Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202); Touvron
    et al. 2023, "LLaMA" (arXiv:2302.13971); Jiang et al. 2024, "Mixtral of Experts" (arXiv:2401.04088).

    >>> import jax.numpy as jnp, sapwood as sw
    >>> model, tokens = Decoder(vocabulary=10, depth=2, width=8, heads=2), jnp.zeros((1, 5), int)
    >>> params, _ = sw.init(model, 0, tokens)
    >>> params["blocks"]["gate"]["kernel"].shape, jax.jit(model)(params, tokens).shape
    ((2, 8, 32), (1, 5, 10))
    """

    mask_of_rows = True  # a mask (batch,) needs no segments, which fewer attention kernels support

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

    def __post_init__(self) -> None:
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
        """The input of the head: tokens `(batch, length)`, mask and segments to `(batch, length, width)`."""
        v, tokens = as_vars(v, self), jnp.asarray(tokens)
        check_inputs.rank("Decoder", tokens, "batch", "length")
        if mask is not None:
            mask = broadcast_leading_mask("Decoder", mask, tokens[..., None])[..., 0]
            if mask.shape == tokens.shape:  # padding is its own segment; rows never see each other
                segments = jnp.where(mask, 0 if segments is None else segments, -1)
            mask = jnp.broadcast_to(mask, tokens.shape)
            tokens = jnp.where(mask, tokens, 0)
        x = L.Embed(self.vocabulary, self.width)(v.embed, tokens)
        x = v.shard(v.policy.cast(x), "batch", "length", "embed")
        x = L.Scan(self._block, self.depth, remat=self.remat, batched=True)(v.blocks, x, segments, mask)
        return L.RMSNorm()(v.norm, x)

    def head(self, v: Vars) -> tuple[jax.Array, jax.Array | None]:
        """The head's kernel `(width, vocabulary)` and bias `(vocabulary,)` or None. They turn features into logits."""
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
