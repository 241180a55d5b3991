"""Mesh axes that a model cannot use: along them every device does the same work."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.declare import Recorder
from sapwood.core.jaxpr import equations
from sapwood.core.spec import trace
from sapwood.parallel.meshes import AXES, AnyMesh
from sapwood.parallel.place_activations import Placement, split_over
from sapwood.parallel.rules import Rules, describe, mesh_axes
from sapwood.parallel.shardings import ShardingWarning, refuse

COLLECTIVE = ("axes", "axis_name")
"""What operations inside a `jax.shard_map` call the mesh axes over which they add, gather or number the devices."""


def _axes(shardings: Iterable[NamedSharding]) -> set[str]:
    return {axis for s in shardings for dim in range(len(s.spec)) for axis in split_over(s, dim)}


def _used_by(equation: Any) -> set[str]:
    """The mesh axes over which an operation splits something: a constraint, a `jax.shard_map`, a jitted function with
    shardings, whoever wrote it."""
    found = jax.tree.leaves(list(equation.params.values()))
    specs = [x.spec if isinstance(x, NamedSharding) else x for x in found]
    dims = [tuple(spec) for spec in specs if isinstance(spec, PartitionSpec)]
    named = jax.tree.leaves([dims, [equation.params.get(key) for key in COLLECTIVE]])
    return {x for x in named if isinstance(x, str)}  # a dimension may be UNCONSTRAINED, a collective one of a vmap


def wasted(
    f: Callable, *xs: Any, mesh: AnyMesh, rules: Rules, shardings: Iterable[NamedSharding], policy: Any = None
) -> tuple[str, ...]:
    """The mesh axes over which ``f(v, *xs)`` in a training run splits nothing: no array of these shardings (parameters
    and batch), and no activation. Nothing is computed; only where the shardings leave an axis out is the model traced.

    >>> import jax, jax.numpy as jnp, sapwood as sw
    >>> from sapwood import layers as L
    >>> mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    >>> wasted(L.Dense(64), jnp.ones((8, 4)), mesh=mesh, rules=sw.parallel.DEFAULT, shardings=())
    ('tensor',)
    """
    left = {axis for axis, size in mesh.shape.items() if size > 1} - _axes(shardings)
    if left:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShardingWarning)  # the run itself gives them
            place = Placement(mesh, rules)
            traced = trace(f, xs, Recorder(), train=True, policy=policy, place=place, by=_jaxpr)
        left -= {axis for equation in equations(traced.jaxpr) for axis in _used_by(equation)}
    return tuple(axis for axis in mesh.axis_names if axis in left)


def warn_of_wasted(f: Callable, *xs: Any, mesh: AnyMesh, rules: Rules, **options: Any) -> None:
    """A `ShardingWarning` for each axis that is `wasted`, which says what would use it; a `ConfigError` under strict
    rules."""
    for axis in wasted(f, *xs, mesh=mesh, rules=rules, **options):
        size = mesh.shape[axis]
        logical = dict.fromkeys(name for name, target in rules.rows if axis in mesh_axes(target))
        sizes = {**mesh.shape, "data": mesh.shape.get("data", 1) * size}
        order = itertools.chain(AXES, mesh.axis_names)
        other = ",".join(f"{a}={sizes[a]}" for a in dict.fromkeys(order) if sizes.get(a, 1) > 1 and a != axis)
        line = (
            f"nothing of this model is split over {axis!r}, so its {size} devices all do the same work. Dimensions "
            f"called {' or '.join(map(repr, logical))} would be, where they divide by {size} and the parameter is not "
            f"small (L.Dense(..., axes=('embed', 'mlp')) names them); mesh {other} has work for every device"
        )
        refuse([line], mesh, rules)
        warnings.warn(f"mesh {describe(mesh)}: {line}", ShardingWarning, stacklevel=3)


def _jaxpr(f: Callable, *args: Any) -> Any:
    return jax.make_jaxpr(f)(*args)
