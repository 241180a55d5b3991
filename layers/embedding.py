"""Embeddings: integer ids to learned vectors, and vectors back to logits over the ids."""

import jax
import jax.numpy as jnp

from sapwood.core.errors import InputError
from sapwood.core.initializers import Initializer, lecun_normal
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars, as_vars
from sapwood.layers import expect
from sapwood.layers.dense import dense


def embed(ids: jax.Array, table: jax.Array) -> jax.Array:
    """The rows of `table` at `ids`: ids `(...)` integers, table `(vocab, features)`, gives `(..., features)`.

    An id outside [0, vocab) gives a row of NaN and no gradient: an array function cannot raise on the device, and
    JAX's own indexing would hand out another id's row (the last for -1, or clamped). `Embed` reports such an id.
    Raises `InputError` for ids that are not integers.

    >>> embed(jnp.array([1, 0, 2]), jnp.array([[1.0], [2.0]]))[:, 0]
    Array([ 2.,  1., nan], dtype=float32)
    """
    ids = expect.integer("embed", ids)
    if table.ndim != 2:
        raise InputError(f"embed expects a table (vocab, features), got {describe(table)}")
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class Embed(Layer):
    """A learned vector for each of `vocab` ids: `(...)` integers to `(..., features)`.

    Parameter: `table` (vocab, features). `attend` turns features back into logits with the same table (Press and Wolf
    2017, "Using the Output Embedding to Improve Language Models", arXiv:1608.05859); the table starts with variance
    1 / features, which makes those logits of unit size. An id outside [0, vocab) fails a `v.check`, which the run
    reports with the entry. Raises `InputError` for ids that are not integers.

    >>> layer, v = Embed(3, 2), {"table": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])}
    >>> layer(v, jnp.array([2, 0]))
    Array([[1., 1.],
           [1., 0.]], dtype=float32)
    >>> layer.attend(v, jnp.array([2.0, 3.0]))
    Array([2., 3., 5.], dtype=float32)
    """

    vocab: int
    features: int
    axes: tuple[str | None, ...] | None = ("vocab", "embed")
    table_init: Initializer = lecun_normal(in_axis=1, out_axis=0)

    def __post_init__(self):
        expect.positive(self, "vocab", "features")
        expect.axes(self, 2, "(vocab, features)")

    def __call__(self, v: Vars, ids: jax.Array) -> jax.Array:
        ids = expect.integer("Embed", ids)
        v.check((ids >= 0) & (ids < self.vocab), f"id outside [0, {self.vocab})")
        return embed(ids, self._table(v))

    def attend(self, v: Vars, x: jax.Array) -> jax.Array:
        """Logits over the ids with the tied table: `(..., features)` to `(..., vocab)`."""
        v = as_vars(v, self)
        return dense(v.policy.cast(x), self._table(v).T, split=True)  # no layer's scope is here to hold reshapes

    def _table(self, v: Vars) -> jax.Array:
        return v.param("table", (self.vocab, self.features), self.table_init, axes=self.axes)
