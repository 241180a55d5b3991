"""Initialization on a mesh: the outputs of the compiled programs are already sharded.

`core.init` draws the values. This file gives it the shardings, and warns of mesh axes that the model does not use.
"""

from collections.abc import Callable
from typing import Any

import jax

from sapwood.core.init import init as initial
from sapwood.core.spec import Spec
from sapwood.parallel.batches import batch_sharding
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.place_activations import placement
from sapwood.parallel.rule_tables import resolve
from sapwood.parallel.rules import Rules
from sapwood.parallel.shardings import param_shardings, state_shardings
from sapwood.parallel.wasted_axes import warn_of_wasted


def init(
    f: Callable,
    key: Any,
    *xs: Any,
    mesh: AnyMesh,
    rules: Rules | str | None = None,
    policy: Any = None,
    data: bool = False,
) -> tuple[dict, dict]:
    """`sapwood.init` on a mesh: the same values bit for bit, and no device holds a large sharded parameter whole.

    Parameters with fewer than 2^20 elements (counted in one block, for a scanned stack) are drawn whole on every
    device, 2^22 elements at a time, by the same program that one device runs. Each device keeps its shard. So their
    bits are the same for every initializer. Larger parameters are drawn in shards. Their random bits are the same, and
    their values too if the initializer treats each element alike. Values may differ by a rounding in three cases: the
    initializer reads the whole array (orthogonal above 2^20 elements), it reads data (`data=True`), or `init` is called
    inside a `jax.jit` of your own.

    Args:
        f: the model, ``f(v, *xs)``.
        key: a `jax.random.key` or an integer seed. With several processes, it must be the same in all of them.
        *xs: example inputs. Only their shapes and dtypes matter, unless `data` is True.
        mesh: the mesh.
        rules: the sharding rules: `Rules`, the name of a table, or None for `DEFAULT`.
        policy: the precision policy, as for `sapwood.init`.
        data: True runs the forward pass once, for data-dependent initializers.

    Returns:
        The pytrees ``(params, state)``; the state is replicated.

    >>> import jax, sapwood.parallel as parallel
    >>> def model(v, x):
    ...     return x @ v.param("kernel", (x.shape[-1], 1024), jax.nn.initializers.lecun_normal())
    >>> params, state = parallel.init(model, 0, jax.numpy.ones((8, 64)), mesh=parallel.mesh("fsdp=-1"))
    >>> params["kernel"].addressable_shards[0].data.shape == (64, 1024 // len(jax.devices()))
    True

    Raises:
        ConfigError: `mesh` and `rules` do not fit together (see `parallel.rule_tables.resolve`).
        DeclarationError: a declaration is wrong, as in `sapwood.spec`.
    """
    mesh, rules = resolve(mesh, rules)

    def shardings(declared: Spec) -> tuple[dict, dict]:
        params = param_shardings(declared.params, mesh, rules)
        split = [*jax.tree.leaves(params), batch_sharding(mesh, rules)]
        warn_of_wasted(f, *xs, mesh=mesh, rules=rules, shardings=split, policy=policy)
        return params, state_shardings(declared.state, mesh)

    return initial(f, key, *xs, data=data, policy=policy, place=placement(mesh, rules), shardings=shardings)
