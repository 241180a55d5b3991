"""`Placement`: what a cursor knows of a mesh, as one callable from logical axis names to the sharding of an activation.

The cursor (`core.vars`) holds it without knowing its class, because `core` imports nothing of `parallel`. The functions
here take it out again: `activation_sharding` for activations, `parameter_sharding` for parameters, `has_mesh`. Inside a
`shard_map`, only the axes that are not Manual can be sharded.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from sapwood.core.errors import DeclarationError
from sapwood.core.traces import is_eager
from sapwood.parallel import torus_gather
from sapwood.parallel.meshes import AnyMesh, with_auto_axes
from sapwood.parallel.rule_tables import resolve, unknown
from sapwood.parallel.rules import Rules, assign, partition
from sapwood.parallel.shardings import ShardingWarning, layout, raise_if_strict, unused_axis_messages


@dataclass(frozen=True)
class Placement:
    """Maps the logical axis names and the shape of an activation to its sharding. Made by `placement`.

    It compares by value, so cursors with equal placements share compiled code.
    """

    mesh: AnyMesh
    rules: Rules

    def __call__(self, axes: tuple[str | None, ...], shape: tuple[int, ...], at: str = "") -> NamedSharding | None:
        """The sharding of an activation; None inside a `shard_map` over the whole mesh, where no axis is left.

        A dimension that the rules would split, but that does not divide, is left whole with a `ShardingWarning`.

        Args:
            axes: the logical name of each dimension, or None.
            shape: the shape of the activation.
            at: the path of the layer, for messages.

        Raises:
            DeclarationError: `axes` and `shape` differ in length.
            ConfigError: an Explicit mesh is set in the context; or a dimension is left whole under strict rules.
        """
        if len(axes) != len(shape):
            raise DeclarationError(f"shard: {len(axes)} names {axes} for an array of shape {tuple(shape)}")
        with_auto_axes(self.mesh)  # raises if an Explicit mesh has been set since: XLA's error would be unclear
        mesh = _inside(self.mesh)
        kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
        free = tuple(axis for axis, kind in kinds if kind != AxisType.Manual)
        if not free:
            return None
        placed, notes = _place(self.rules, tuple(axes), tuple(shape), free)
        what = f"{at and f'{at}: '}activation {axes} of shape {tuple(shape)}"
        raise_if_strict([f"{what}: {note}" for note in notes], self.mesh, self.rules)
        for note in notes:
            warnings.warn(f"{what}: {note}", ShardingWarning, stacklevel=3)
        return NamedSharding(mesh, partition(list(placed)))

    def gather(self, x: jax.Array, axes: tuple[str | None, ...] | None) -> jax.Array:
        """Apply the first of two gathers to a parameter that is being read, if one gather would span a whole TPU torus.

        See `torus_gather`. Other parameters are returned unchanged. `axes` are the parameter's logical axis names.
        """
        if not isinstance(self.mesh, Mesh) or _inside(self.mesh) is not self.mesh:
            return x
        for axis in _stored_alone(self.rules, axes, x.shape, tuple(self.mesh.shape.items())):
            if (finer := torus_gather.split_axis(self.mesh, axis)) is not None:
                if is_eager():  # op by op: every operation is a program, and takes arrays of one mesh
                    return x
                kept = layout(SimpleNamespace(shape=x.shape, axes=axes), self.mesh, self.rules)[0]
                return torus_gather.constrain_with_barrier(x, NamedSharding(finer, partition(kept)))
        return x


def placement(mesh: AnyMesh, rules: Rules | str | None = None) -> Placement:
    """Make the argument ``place=`` of `sapwood.bind` and `sapwood.apply`, which tells ``v.shard`` the mesh.

    >>> import sapwood.parallel as parallel
    >>> place = parallel.placement(parallel.mesh("data=-1"))
    >>> place(("batch", "embed"), (16, 4)).mesh.axis_names
    ('data',)

    Raises:
        ConfigError: `mesh` and `rules` do not fit together (see `parallel.rule_tables.resolve`).
    """
    return Placement(*resolve(mesh, rules))


def activation_sharding(v: Any, x: Any, *axes: str | None) -> NamedSharding | None:
    """The sharding of an activation on the mesh of a cursor; None without a mesh.

    It is for kernels that the compiler cannot split and that need a `jax.shard_map`. All other code calls `v.shard`.

    Args:
        v: the cursor.
        x: the activation, or another object with its shape.
        *axes: the logical name of each dimension, or None.

    >>> import jax, sapwood as sw
    >>> v = sw.bind({}, place=placement(jax.sharding.AbstractMesh((4,), ("data",))))
    >>> tuple(activation_sharding(v, jax.ShapeDtypeStruct((8, 4), "float32"), "batch", "embed").spec)
    ('data', None)
    """
    place = v._place
    return place(axes, x.shape, v._at()) if isinstance(place, Placement) else place and place(axes, x.shape)


def split_over(sharding: NamedSharding | None, dim: int) -> tuple[str, ...]:
    """The mesh axes that dimension `dim` is split over; empty without a sharding.

    >>> from jax.sharding import AbstractMesh, PartitionSpec
    >>> sharding = NamedSharding(AbstractMesh((4,), ("data",)), PartitionSpec("data"))
    >>> split_over(sharding, 0), split_over(sharding, 1), split_over(None, 0)
    (('data',), (), ())
    """
    names = sharding.spec[dim] if sharding is not None and dim < len(sharding.spec) else None
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def shards(sharding: NamedSharding | None, dim: int) -> int:
    """The number of parts that dimension `dim` is split into; 1 without a sharding."""
    return math.prod(sharding.mesh.shape[name] for name in split_over(sharding, dim)) if sharding is not None else 1


def parameter_sharding(v: Any, parameter: Any, *axes: str | None) -> NamedSharding | None:
    """The sharding in which a parameter is stored; None without a mesh, and inside a `shard_map` of that mesh.

    Args:
        v: the cursor.
        parameter: the parameter, or another object with its shape.
        *axes: the logical name of each dimension, or None.

    >>> import jax, sapwood as sw
    >>> v = sw.bind({}, place=placement(jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))))
    >>> table, small = (jax.ShapeDtypeStruct((size, 128), "float32") for size in (32000, 80))
    >>> [tuple(parameter_sharding(v, x, "vocab", "embed").spec) for x in (table, small)]
    [('tensor', 'fsdp'), (None, None)]
    """
    place = v._place
    if not isinstance(place, Placement) or _inside(place.mesh) is not place.mesh:
        return None
    leaf = SimpleNamespace(shape=parameter.shape, axes=axes)
    return NamedSharding(place.mesh, partition(layout(leaf, place.mesh, place.rules)[0]))


def has_mesh(v: Any) -> bool:
    """True if a cursor runs on a mesh.

    >>> import sapwood as sw
    >>> has_mesh(sw.bind({}))
    False
    """
    return v._place is not None


def _inside(mesh: AnyMesh) -> AnyMesh:
    """The mesh as a surrounding `shard_map` sees it: with Manual axes, which a sharding constraint must not name.

    Without a `shard_map` of this mesh, it is the mesh itself.
    """
    context = jax.sharding.get_abstract_mesh()
    same = context.axis_names == mesh.axis_names and context.axis_sizes == mesh.axis_sizes
    return context if same and AxisType.Manual in context.axis_types else mesh


@functools.lru_cache(maxsize=1024)
def _stored_alone(rules: Rules, axes, shape, sizes) -> tuple[str, ...]:
    """The mesh axes that split a parameter in storage, but not in computation."""
    leaf, mesh = SimpleNamespace(shape=shape, axes=axes), SimpleNamespace(shape=dict(sizes))
    kept = layout(leaf, cast(AnyMesh, mesh), rules)[0]
    computed = assign(rules.table, axes or (None,) * len(shape), shape, mesh.shape)[0]
    return tuple(axis for both in zip(kept, computed, strict=True) for axis in both[0] if axis not in both[1])


@functools.lru_cache(maxsize=1024)
def _place(rules: Rules, axes, shape, sizes) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    placed, missed = assign(rules.table, axes, shape, dict(sizes))
    return tuple(placed), (*unused_axis_messages(missed, axes, shape, dict(sizes)), *unknown(rules, axes))
