"""`placement`: what a cursor needs to know of a mesh, as one opaque callable."""

import functools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from sapwood.core.errors import DeclarationError
from sapwood.core.traces import is_run_at_once
from sapwood.parallel import torus_gather
from sapwood.parallel.meshes import AnyMesh, automatic
from sapwood.parallel.rule_tables import resolve, unknown
from sapwood.parallel.rules import Rules, assign, partition
from sapwood.parallel.shardings import ShardingWarning, layout, lost, refuse


@dataclass(frozen=True)
class Placement:
    """Maps the logical axis names and the shape of an activation to its sharding. Made by `placement`.

    It compares by value, so that cursors which carry equal ones share compiled code.
    """

    mesh: AnyMesh
    rules: Rules

    def __call__(self, axes: tuple[str | None, ...], shape: tuple[int, ...], at: str = "") -> NamedSharding | None:
        """The sharding, or None where nothing is left to say (inside a `shard_map` over the whole mesh).

        A dimension that is left whole is a `ShardingWarning`, which names the layer `at` which it is.
        """
        if len(axes) != len(shape):
            raise DeclarationError(f"shard: {len(axes)} names {axes} for an array of shape {tuple(shape)}")
        automatic(self.mesh)  # an Explicit mesh may have been set since; say so rather than let XLA say it
        mesh = _inside(self.mesh)
        kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
        free = tuple(axis for axis, kind in kinds if kind != AxisType.Manual)
        if not free:
            return None
        placed, notes = _place(self.rules, tuple(axes), tuple(shape), free)
        what = f"{at and f'{at}: '}activation {axes} of shape {tuple(shape)}"
        refuse([f"{what}: {note}" for note in notes], self.mesh, self.rules)
        for note in notes:
            warnings.warn(f"{what}: {note}", ShardingWarning, stacklevel=3)
        return NamedSharding(mesh, partition(list(placed)))

    def gather(self, x: jax.Array, axes: tuple[str | None, ...] | None) -> jax.Array:
        """A parameter as it is read, in the first of two gathers where one would go over a whole torus: see `torus`."""
        if not isinstance(self.mesh, Mesh) or _inside(self.mesh) is not self.mesh:
            return x
        for axis in _stored_alone(self.rules, axes, x.shape, tuple(self.mesh.shape.items())):
            if (finer := torus_gather.in_two(self.mesh, axis)) is not None:
                if is_run_at_once():  # each operation is a program of its own, which takes arrays of one mesh alone
                    return x
                kept = layout(SimpleNamespace(shape=x.shape, axes=axes), self.mesh, self.rules)[0]
                return torus_gather.apart(x, NamedSharding(finer, partition(kept)))
        return x


def placement(mesh: AnyMesh, rules: Rules | str | None = None) -> Placement:
    """What `sapwood.bind(..., place=)` and `sapwood.apply(..., place=)` take, so that ``v.shard`` knows the
    mesh.

    >>> import sapwood.parallel as parallel
    >>> place = parallel.placement(parallel.mesh("data=-1"))
    >>> place(("batch", "embed"), (16, 4)).mesh.axis_names
    ('data',)

    Raises:
      ConfigError: mesh and rules do not fit together.
    """
    return Placement(*resolve(mesh, rules))


def placed(v: Any, x: Any, *axes: str | None) -> NamedSharding | None:
    """Where an activation of these logical axes lies on the mesh of a cursor's run; None where there is no mesh.

    For kernels that the compiler cannot split and that need a `jax.shard_map`; everything else says `v.shard`.

    >>> import jax, sapwood as sw
    >>> v = sw.bind({}, place=placement(jax.sharding.AbstractMesh((4,), ("data",))))
    >>> tuple(placed(v, jax.ShapeDtypeStruct((8, 4), "float32"), "batch", "embed").spec)
    ('data', None)
    """
    place = v._place
    return place(axes, x.shape, v._at()) if isinstance(place, Placement) else place and place(axes, x.shape)


def split_over(sharding: NamedSharding | None, dim: int) -> tuple[str, ...]:
    """The mesh axes that a dimension is split over.

    >>> from jax.sharding import AbstractMesh, PartitionSpec
    >>> sharding = NamedSharding(AbstractMesh((4,), ("data",)), PartitionSpec("data"))
    >>> split_over(sharding, 0), split_over(sharding, 1), split_over(None, 0)
    (('data',), (), ())
    """
    names = sharding.spec[dim] if sharding is not None and dim < len(sharding.spec) else None
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def shards(sharding: NamedSharding | None, dim: int) -> int:
    """How many parts a dimension is split into; 1 where there is no sharding."""
    return math.prod(sharding.mesh.shape[name] for name in split_over(sharding, dim)) if sharding is not None else 1


def stored(v: Any, parameter: Any, *axes: str | None) -> NamedSharding | None:
    """Where a parameter of these logical axes is kept; None where there is no mesh, or a `shard_map` around.

    >>> import jax, sapwood as sw
    >>> v = sw.bind({}, place=placement(jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))))
    >>> table, small = (jax.ShapeDtypeStruct((size, 128), "float32") for size in (32000, 80))
    >>> tuple(stored(v, table, "vocab", "embed").spec), tuple(stored(v, small, "vocab", "embed").spec)
    (('tensor', 'fsdp'), (None, None))
    """
    place = v._place
    if not isinstance(place, Placement) or _inside(place.mesh) is not place.mesh:
        return None
    leaf = SimpleNamespace(shape=parameter.shape, axes=axes)
    return NamedSharding(place.mesh, partition(layout(leaf, place.mesh, place.rules)[0]))


def meshed(v: Any) -> bool:
    """Whether the run of a cursor has a mesh.

    >>> import sapwood as sw
    >>> meshed(sw.bind({}))
    False
    """
    return v._place is not None


def _inside(mesh: AnyMesh) -> AnyMesh:
    """The mesh as the surrounding `shard_map` sees it, with Manual axes, which a constraint may not name."""
    context = jax.sharding.get_abstract_mesh()
    same = context.axis_names == mesh.axis_names and context.axis_sizes == mesh.axis_sizes
    return context if same and AxisType.Manual in context.axis_types else mesh


@functools.lru_cache(maxsize=1024)
def _stored_alone(rules: Rules, axes, shape, sizes) -> tuple[str, ...]:
    """The mesh axes over which a parameter is kept in pieces, and not computed with."""
    leaf, mesh = SimpleNamespace(shape=shape, axes=axes), SimpleNamespace(shape=dict(sizes))
    kept = layout(leaf, cast(AnyMesh, mesh), rules)[0]
    computed = assign(rules.table, axes or (None,) * len(shape), shape, mesh.shape)[0]
    return tuple(axis for both in zip(kept, computed, strict=True) for axis in both[0] if axis not in both[1])


@functools.lru_cache(maxsize=1024)
def _place(rules: Rules, axes, shape, sizes) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    placed, missed = assign(rules.table, axes, shape, dict(sizes))
    return tuple(placed), (*lost(missed, axes, shape, dict(sizes)), *unknown(rules, axes))
