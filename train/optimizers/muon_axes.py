"""`matrices`: derives from logical axes which parameters Muon takes as matrices, and which dimensions are their rows.

optax calls this the dimension numbers of a parameter: `reduction_axis` are the rows, `output_axis` the columns.
"""

from collections.abc import Callable
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from sapwood.core import messages, paths
from sapwood.core.errors import ConfigError
from sapwood.core.param import Param
from sapwood.core.unrolled_trees import stacks

TABLES = ("vocab", "length")
"""Axes of tables, which are looked up or compared row by row: Muon's authors give embeddings and heads to Adam."""


def matrices(params: Any) -> Callable[[Any], Any]:
    """Make the argument ``muon_weight_dimension_numbers`` of `optax.contrib.muon` from the logical axes of parameters.

    By default Muon takes every parameter of two dimensions, also embeddings and the head, and leaves attention's
    kernels ("embed", "heads", "kv") to Adam. With this function the axes decide:

    - A kernel whose first axis is "embed" is a matrix from that axis to all others.
    - Any other kernel is a matrix from all its axes but the last to the last: ("heads", "kv", "embed") has heads * kv
      rows.
    - A leading axis "expert" counts matrices, one for each expert.
    - Adam gets parameters with an axis "vocab" or "length", with fewer than two dimensions, or with more than two
      dimensions and no names.

    Args:
        params: the tree of `Param` of ``sw.spec(...).params``.

    Returns:
        A function from a tree of parameters to the tree of their `MuonDimensionNumbers`, with None for Adam. It raises
        `ConfigError` for parameters of another model.

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
    """Return the dimension numbers of one parameter, or None for Adam.

    They are counted from the end, so they hold for a block and for its stack.
    """
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
