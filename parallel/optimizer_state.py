"""Shardings of the optimizer state: each leaf is sharded like its parameter.

The parameter of a leaf is found by the structure of the state, never by shape. `optax.tree_map_params` does that; for
optimizers that it cannot handle, `_by_path` compares paths. `_beside` is the rule for a leaf with more or fewer
dimensions than its parameter.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.unrolled_trees import StackMapping, Stacks, unrolled_structs
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.shardings import replicated


def opt_shardings(optimizer: Any, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
    """A pytree like ``optimizer.init(params)`` with the `NamedSharding` of every leaf.

    A leaf that mirrors a parameter (momentum, second moment, accumulated gradient, average) has the sharding of the
    parameter. A leaf with other dimensions keeps the sharding of the dimensions that it shares with its parameter:
    Adafactor's row and column factors lack the dimension they average over, and the history of L-BFGS has an additional
    leading dimension. Counters, schedules and scales are replicated. For an optimizer that sees a stack as its blocks
    (`train.blockwise`), all this holds for one block; the stack's dimensions are sharded like those of the parameter.

    Args:
        optimizer: an optax transformation, or another object with ``init(params)``.
        params: a pytree of `Param`, `jax.ShapeDtypeStruct` or arrays.
        shardings: a pytree like `params`, from `param_shardings`.
        mesh: the mesh on which leaves without a parameter are replicated.

    >>> import jax, optax, sapwood.parallel as parallel
    >>> mesh = parallel.mesh("fsdp=-1")
    >>> params = {"kernel": jax.ShapeDtypeStruct((256, 512), "float32")}
    >>> shardings = parallel.param_shardings(params, mesh)
    >>> state = parallel.opt_shardings(optax.adam(1e-3), params, shardings, mesh)
    >>> state[0].mu["kernel"] == shardings["kernel"], state[0].count.is_fully_replicated
    (True, True)
    """
    import optax

    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    if hasattr(optimizer, "blocks"):
        inner, stacks = optimizer.blocks
        return _of_blocks(inner, stacks, structs, shardings, mesh)
    state = jax.eval_shape(optimizer.init, structs)
    whole = replicated(mesh)

    def masked(node):  # stands for the parameters that `optax.masked` leaves out
        return isinstance(node, optax.MaskedNode)

    def beside(leaf, param, sharding):
        return leaf if masked(leaf) else _beside(leaf.shape, param.shape, sharding)

    try:
        return optax.tree_map_params(
            optimizer,
            beside,
            state,
            structs,
            shardings,
            transform_non_params=lambda _: whole,
            is_leaf=masked,
        )
    except Exception:
        # tree_map_params runs `init` on placeholders in place of the parameters. That fails if `init` looks at its
        # parameters (L-BFGS) or keeps a tree of its own for each of them (SM3). Paths still agree.
        return _by_path(state, structs, shardings, whole)


def _of_blocks(optimizer: Any, stacks: Stacks, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
    """Shardings for a blockwise optimizer: those of one block, with the stack's dimensions as in the parameter."""
    blocks = unrolled_structs(params, stacks)
    of_params = StackMapping(blocks, stacks)
    lead, cut = {}, []
    for slot, sharding in zip(of_params.slots, jax.tree.leaves(shardings), strict=True):
        n = len(slot.sizes)
        spec = (*sharding.spec, *(None,) * (n - len(sharding.spec)))
        lead[slot.stack] = spec[:n]
        cut.append([NamedSharding(sharding.mesh, PartitionSpec(*spec[n:]))] * len(slot.members))
    of_state = StackMapping(jax.eval_shape(optimizer.init, blocks), stacks)
    alone = jax.tree.leaves(opt_shardings(optimizer, blocks, of_params.scatter(cut), mesh))
    result = []
    for slot in of_state.slots:
        sharding, stack = alone[slot.members[0]], slot.stack
        if stack is not None:
            dims = (*sharding.spec, *(None,) * (slot.axis - len(sharding.spec)))
            spec = PartitionSpec(*dims[: slot.axis], *lead[stack], *dims[slot.axis :])
            sharding = NamedSharding(sharding.mesh, spec)
        result.append(sharding)
    return jax.tree.unflatten(of_state.stacked, result)


def _beside(shape: Sequence[int], param: Sequence[int], sharding: NamedSharding) -> NamedSharding:
    """The sharding of a leaf of `shape`, whose parameter has the shape `param` and this sharding.

    Dimensions in front of the parameter's are not split. A leaf that lacks one of the parameter's dimensions has the
    sharding of the others. Every other leaf is replicated.
    """
    shape, param = tuple(shape), tuple(param)
    spec = (*sharding.spec, *(None,) * (len(param) - len(sharding.spec)))
    extra = len(shape) - len(param)
    kept: set[tuple] = set()
    if extra >= 0 and shape[extra:] == param:
        kept = {(None,) * extra + spec}
    elif extra == -1:
        kept = {spec[:d] + spec[d + 1 :] for d in range(len(param)) if param[:d] + param[d + 1 :] == shape}
    # A factor of a square parameter may lack either dimension. Replication is right for both, and factors are small.
    return NamedSharding(sharding.mesh, PartitionSpec(*kept.pop()) if len(kept) == 1 else PartitionSpec())


def _by_path(state: Any, params: Any, shardings: Any, whole: NamedSharding) -> Any:
    """Shardings by paths: a leaf belongs to the parameter whose path ends its own, ``0/mu/up/kernel`` to ``up/kernel``.

    A leaf without a parameter gets the sharding `whole`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {path: (p.shape, s) for (path, p), s in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def place(path, leaf):
        for start in range(len(path)):
            if path[start:] in known:
                return _beside(leaf.shape, *known[path[start:]])
        return whole

    return jax.tree_util.tree_map_with_path(place, state)
