"""Position embeddings: rotary embeddings of queries and keys, and learned vectors added to the features.

`Rotary` is an argument of `MultiHeadAttention`, which calls it on queries and keys. `LearnedPositions` is a layer of
its own, called on the features.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError, InputError
from sapwood.core.initializers import Initializer, normal
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.expand_rank import expand_rank


def rotary(x: jax.Array, positions: jax.Array | None = None, base: float = 10000.0) -> jax.Array:
    """Rotate pairs of features by angles that grow with the position, so that q · k depends only on the distance.

    Takes x `(batch, length, heads, head_dim)` and positions `(length,)` or `(batch, length)` (0, 1, 2, ... by default),
    and returns the shape and dtype of x. Feature i of the first half is paired with feature i of the second half (the
    layout of GPT-NeoX and Llama) and rotated by `position * base ** (-2 i / head_dim)`, in float32 or wider. Raises
    `InputError` for an odd head_dim or positions of another shape.

    >>> rotary(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.array([np.pi / 2]))[0, 0, 0].round(4)
    Array([-0.,  1.], dtype=float32)
    """
    x = check_inputs.floating("rotary", x)
    check_inputs.rank("rotary", x, "batch", "length", "heads", "head_dim")
    length, head_dim = x.shape[1], x.shape[3]
    if head_dim % 2:
        raise InputError(f"rotary turns pairs of features, so head_dim must be even, got {describe(x)}")
    positions = jnp.arange(length) if positions is None else jnp.asarray(positions)
    if positions.shape not in ((length,), x.shape[:2]):
        raise InputError(
            f"rotary expects positions (length,) or (batch, length), got {describe(positions)} for x {describe(x)}"
        )
    wide = np.promote_types(x.dtype, np.float32)
    frequencies = (float(base) ** (-np.arange(0, head_dim, 2) / head_dim)).astype(wide)
    places = positions.astype(wide)[..., None, None]
    angles = places * expand_rank(frequencies, places)  # (..., length, 1, head_dim / 2)
    cos, sin = (expand_rank(turn, x) for turn in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Rotary(Layer):
    """Rotary position embedding of queries or keys; see `rotary`. No parameters.

    Give it to `MultiHeadAttention(rotary=Rotary())`. Raises `ConfigError` for a base that is not above 1, `InputError`
    for an odd head_dim. Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding"
    (arXiv:2104.09864).

    >>> Rotary()({}, jnp.ones((1, 5, 2, 4))).shape
    (1, 5, 2, 4)
    """

    base: float = 10000.0

    def __post_init__(self) -> None:
        if not isinstance(self.base, int | float) or self.base <= 1:
            raise ConfigError(f"Rotary: base must be a number above 1, got {self.base!r}")

    def __call__(self, v: Vars, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        return rotary(x, positions, self.base)


class LearnedPositions(Layer):
    """Add a learned vector for each position: `(batch, length, features)` to the same.

    Parameter: `table` (max_length, features). Position i is the index along the length. Raises `InputError` for an x
    longer than `max_length`. Gehring et al. 2017, "Convolutional Sequence to Sequence Learning" (arXiv:1705.03122).

    >>> LearnedPositions(4)({"table": jnp.arange(4.0)[:, None]}, jnp.zeros((1, 3, 1)))[0, :, 0]
    Array([0., 1., 2.], dtype=float32)
    """

    max_length: int
    axes: tuple[str | None, ...] | None = (None, "embed")
    table_init: Initializer = normal(0.02)

    def __post_init__(self) -> None:
        check_inputs.positive(self, "max_length")
        check_inputs.axes(self, 2, "(max_length, features)")

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("LearnedPositions", x))
        check_inputs.rank("LearnedPositions", x, "batch", "length", "features")
        if x.shape[1] > self.max_length:
            raise InputError(
                f"LearnedPositions has max_length={self.max_length}, got length {x.shape[1]}: {describe(x)}"
            )
        table = v.param("table", (self.max_length, x.shape[2]), self.table_init, axes=self.axes)
        return x + expand_rank(table[: x.shape[1]], x)
