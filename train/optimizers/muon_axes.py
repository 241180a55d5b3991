"""Which parameters are matrices, and which of their dimensions are rows: what Muon must be told, from the axes."""

from collections.abc import Callable
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from sapwood.core import messages, paths
from sapwood.core.errors import ConfigError
from sapwood.core.param import Param
from sapwood.core.unrolled_trees import stacks

TABLES = ("vocab", "length")
"""Axes of what is looked up or compared row by row: Muon's authors give embeddings and heads to Adam."""


def matrices(params: Any) -> Callable[[Any], Any]:
    """What ``optax.contrib.muon(muon_weight_dimension_numbers=)`` takes, by the logical axes of the parameters.

    By itself Muon takes what has two dimensions, embeddings and the head included, and leaves attention's kernels
    ("embed", "heads", "kv") to Adam. By their axes, a kernel whose first axis is "embed" maps that onto all the others;
    any other maps all but its last onto the last, so ("heads", "kv", "embed") is a matrix of heads * kv rows. A leading
    "expert" counts matrices. What has an axis "vocab" or "length", less than two dimensions, or more than two without
    names, is left to Adam.

    Args:
      params: the tree of `Param` of ``sw.spec(...).params``.

    Raises `ConfigError` when it is given another model's parameters.

    >>> import jax.numpy as jnp, optax, sapwood as sw
    >>> from sapwood import layers as L
    >>> spec = sw.spec(L.MultiHeadAttention(2), jnp.ones((1, 4, 8)))
    >>> optimizer = optax.contrib.muon(0.02, muon_weight_dimension_numbers=matrices(spec.params))
    >>> found = matrices(spec.params)(spec.params)
    >>> found["query"]["kernel"]
    MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-2, -1))
    >>> found["out"]["kernel"]
    MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,))
    """
    known = {path: _numbers(param) for path, param in paths.leaves(params)}
    for stack in stacks(params):
        known |= {path: known[stack.path] for _, path in stack.unrolled()}

    def numbers(path: Any, _: Any) -> MuonDimensionNumbers | None:
        name: tuple[Any, ...] = tuple(getattr(key, "key", None) for key in path)
        if name not in known:
            near = messages.nearest("/".join(map(str, name)), map("/".join, known))
            raise ConfigError(
                f"matrices(params): {jax.tree_util.keystr(path, simple=True, separator='/')} is none of the parameters "
                f"given{near}; give it the spec of this model"
            )
        return known[name]

    return lambda tree: jax.tree_util.tree_map_with_path(numbers, tree)


def _numbers(param: Param) -> MuonDimensionNumbers | None:
    """Counted from the end, so that they hold for one block and for the stack."""
    lead = len(param.stacked)
    n = len(param.shape) - lead
    axes = (None,) * n if param.axes is None else param.axes[lead:]
    if any(name in TABLES for name in axes) or (param.axes is None and n != 2):
        return None
    dims = tuple(range(-n, 0))[1 if axes[:1] == ("expert",) else 0 :]
    if len(dims) < 2:
        return None
    rows = 1 if axes[dims[0]] == "embed" else len(dims) - 1
    return MuonDimensionNumbers(dims[:rows], dims[rows:])
