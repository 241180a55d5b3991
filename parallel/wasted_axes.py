"""Warnings about mesh axes that a model does not use: along such an axis, every device does the same work.

Axes that split parameters or the batch are in use. Only if an axis is left over, the model is traced, and the axes that
its operations name are in use too.
"""

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
from sapwood.parallel.shardings import ShardingWarning, raise_if_strict

COLLECTIVE = ("axes", "axis_name")
"""The parameters of collective operations that hold mesh axes: those they sum over, gather over or index."""


def _axes(shardings: Iterable[NamedSharding]) -> set[str]:
    return {axis for s in shardings for dim in range(len(s.spec)) for axis in split_over(s, dim)}


def _used_by(equation: Any) -> set[str]:
    """The mesh axes that an operation names: a sharding constraint, a `jax.shard_map`, a collective, or a jitted
    function with shardings. It may be the user's or Sapwood's."""
    found = jax.tree.leaves(list(equation.params.values()))
    specs = [x.spec if isinstance(x, NamedSharding) else x for x in found]
    dims = [tuple(spec) for spec in specs if isinstance(spec, PartitionSpec)]
    named = jax.tree.leaves([dims, [equation.params.get(key) for key in COLLECTIVE]])
    return {x for x in named if isinstance(x, str)}  # no UNCONSTRAINED dimensions, no axes of vmap


def wasted(
    f: Callable, *xs: Any, mesh: AnyMesh, rules: Rules, shardings: Iterable[NamedSharding], policy: Any = None
) -> tuple[str, ...]:
    """The mesh axes over which ``f(v, *xs)`` splits nothing in a training run: no parameter, no batch, no activation.

    Nothing is computed. The model is traced only if the shardings leave out an axis.

    Args:
        f: the model or objective.
        *xs: its example inputs.
        mesh: the mesh; axes of size 1 are never wasted.
        rules: the sharding rules of activations.
        shardings: the shardings of the parameters and of the batch.
        policy: the precision policy, as for `sapwood.init`.

    >>> import jax, jax.numpy as jnp, sapwood as sw
    >>> from sapwood import layers as L
    >>> mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    >>> wasted(L.Dense(64), jnp.ones((8, 4)), mesh=mesh, rules=sw.parallel.DEFAULT, shardings=())
    ('tensor',)
    """
    left = {axis for axis, size in mesh.shape.items() if size > 1} - _axes(shardings)
    if left:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShardingWarning)  # the run itself gives these warnings
            place = Placement(mesh, rules)
            traced = trace(f, xs, Recorder(), train=True, policy=policy, place=place, by=_jaxpr)
        left -= {axis for equation in equations(traced.jaxpr) for axis in _used_by(equation)}
    return tuple(axis for axis in mesh.axis_names if axis in left)


def warn_of_wasted(f: Callable, *xs: Any, mesh: AnyMesh, rules: Rules, **options: Any) -> None:
    """Warn of each axis that is `wasted`, and say what would use it. The arguments are those of `wasted`.

    The warning is a `ShardingWarning`; under strict rules it is a `ConfigError`.
    """
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
        raise_if_strict([line], mesh, rules)
        warnings.warn(f"mesh {describe(mesh)}: {line}", ShardingWarning, stacklevel=3)


def _jaxpr(f: Callable, *args: Any) -> Any:
    return jax.make_jaxpr(f)(*args)
