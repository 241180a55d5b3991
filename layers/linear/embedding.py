"""Embeddings: integer ids to learned vectors, and vectors back to logits over the ids.

`embed` is the lookup on one device. `embed_split` looks up in a table whose rows are split over a mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.errors import InputError
from sapwood.core.initializers import Initializer, lecun_normal
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars, as_vars
from sapwood.layers import check_inputs
from sapwood.layers.linear.dense import dense
from sapwood.parallel.per_device import per_device
from sapwood.parallel.place_activations import activation_sharding, parameter_sharding, split_over


def embed(ids: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of `table` at `ids`: ids `(...)` integers, table `(vocab, features)`, result `(..., features)`.

    An id outside [0, vocab) gives a row of NaN and no gradient. An array function cannot raise on the device, and JAX's
    own indexing would return the row of another id (the last for -1, or clamped). `Embed` reports such an id. Raises
    `InputError` for ids that are not integers.

    >>> embed(jnp.array([1, 0, 2]), jnp.array([[1.0], [2.0]]))[:, 0]
    Array([ 2.,  1., nan], dtype=float32)
    """
    ids = check_inputs.integer("embed", ids)
    if table.ndim != 2:
        raise InputError(f"embed expects a table (vocab, features), got {describe(table)}")
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def embed_split(ids: jax.Array, table: jax.Array, rows: NamedSharding, out: NamedSharding) -> jax.Array:
    """`embed(ids, table)` for a table whose rows are split over devices.

    Each device looks up the ids whose rows it holds and takes zeros for the others; then the devices' results are
    summed. So only the rows asked for are sent, and each device computes the gradient of its own rows. If the features
    are stored in shards too (FSDP), they are gathered first and their gradient is scattered. The compiler by itself
    gathers the whole table.

    Args:
        ids: `(...)`, integers.
        table: `(vocab, features)`.
        rows: the sharding of the table.
        out: the sharding of the result without its features.

    Returns:
        `(..., features)`, with its leading dimensions sharded as `out`.

    Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053).

    >>> import sapwood as sw
    >>> mesh = sw.mesh("tensor=-1")
    >>> rows, out = NamedSharding(mesh, PartitionSpec("tensor", None)), NamedSharding(mesh, PartitionSpec())
    >>> jax.jit(lambda ids: embed_split(ids, jnp.arange(8.0)[:, None], rows, out)[:, 0])(jnp.array([3, 8]))
    Array([ 3., nan], dtype=float32)
    """
    ids = check_inputs.integer("embed_split", ids)
    names, kept, vocab = split_over(rows, 0), split_over(rows, 1), table.shape[0]
    axes = tuple(split_over(out, dim) or None for dim in range(ids.ndim))

    def local(ids: Any, table: Any) -> jax.Array:
        table = lax.all_gather(table, kept, axis=1, tiled=True) if kept else table
        here = ids - lax.axis_index(names) * table.shape[0]
        mine = (here >= 0) & (here < table.shape[0])
        y = table.at[jnp.where(mine, here, table.shape[0])].get(mode="fill", fill_value=0)
        known = (ids >= 0) & (ids < vocab)
        return jnp.where(known[..., None], y, jnp.nan)[None]

    spec = PartitionSpec(*axes), PartitionSpec(names, kept or None)
    parts = per_device(local, rows.mesh, spec, PartitionSpec(names, *axes, None))(ids, table)
    # Summed outside of the `shard_map`, so that the backward pass sends nothing: each part's gradient is that of the
    # sum. The sum needs no wider dtype, since all parts but one are zero.
    return lax.reduce_sum(parts, axes=(0,))


class Embed(Layer):
    """A learned vector for each of `vocab` ids: `(...)` integers to `(..., features)`.

    Parameter: `table` (vocab, features). Its initial variance is 1 / features, which gives the logits of `attend` unit
    size. `attend` computes logits from features with the same table (Press and Wolf 2017, "Using the Output Embedding
    to Improve Language Models", arXiv:1608.05859). An id outside [0, vocab) fails a `v.check`, and the run reports the
    entry. On a mesh whose rules split "vocab", the table stays split (`embed_split`), and ids are
    `(batch, length, ...)`.

    Args:
        vocab: number of ids.
        features: size of each vector.
        axes: the table's logical axis names, or None.
        table_init: initializer of the table.

    Raises:
        InputError: the ids are not integers.

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

    def __post_init__(self) -> None:
        check_inputs.positive(self, "vocab", "features")
        check_inputs.axes(self, 2, "(vocab, features)")

    def __call__(self, v: Vars, ids: jax.Array) -> jax.Array:
        ids = check_inputs.integer("Embed", ids)
        v.check((ids >= 0) & (ids < self.vocab), f"id outside [0, {self.vocab})")
        table, axes = self._table(v), self.axes or (None, None)
        computed, rows = activation_sharding(v, table, *axes), parameter_sharding(v, table, *axes)
        if rows is None or not split_over(rows, 0) or split_over(rows, 0) != split_over(computed, 0):
            return embed(ids, table)
        out = activation_sharding(v, ids, *("batch", "length", *(None,) * ids.ndim)[: ids.ndim])
        assert out is not None
        return embed_split(ids, table, rows, out)

    def attend(self, v: Vars, x: jax.Array) -> jax.Array:
        """Logits over the ids with the tied table: `(..., features)` to `(..., vocab)`."""
        v = as_vars(v, self)
        return dense(v.policy.cast(x), self._table(v).T, split=True)  # no reshapes: no layer's scope would name them

    def _table(self, v: Vars) -> jax.Array:
        return v.param("table", (self.vocab, self.features), self.table_init, axes=self.axes)
