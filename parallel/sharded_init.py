"""Arrays born sharded: initialisation as one compiled program whose outputs already lie where they belong."""

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

    Parameters below 2^20 elements (a block's, where they are of a scanned stack) are drawn whole on every device, 2^22
    elements at a time, by the program that one device runs; each device keeps its piece. So their bits are equal
    whatever the initialiser is. Larger ones are drawn in pieces: the random bits are the same, and for initialisers
    that treat each element alike so are the values. What reads the whole array (orthogonal above 2^20 elements) or
    data (`data=True`), and `init` inside a `jax.jit` of your own, may differ by a rounding.

    Args:
      f: the model, ``f(v, *xs)``.
      key: a `jax.random.key` or an integer seed; with several processes the same one in all of them.
      xs: example inputs; only shapes and dtypes matter, unless `data`.
      data: run the forward pass once for data-dependent initialisers.

    >>> import jax, sapwood.parallel as parallel
    >>> def model(v, x):
    ...     return x @ v.param("kernel", (x.shape[-1], 1024), jax.nn.initializers.lecun_normal())
    >>> params, state = parallel.init(model, 0, jax.numpy.ones((8, 64)), mesh=parallel.mesh("fsdp=-1"))
    >>> params["kernel"].addressable_shards[0].data.shape == (64, 1024 // len(jax.devices()))
    True

    Raises:
      ConfigError: mesh and rules do not fit together.
      DeclarationError: what `sapwood.spec` raises for a wrong declaration.
    """
    mesh, rules = resolve(mesh, rules)

    def shardings(declared: Spec) -> tuple[dict, dict]:
        params = param_shardings(declared.params, mesh, rules)
        split = [*jax.tree.leaves(params), batch_sharding(mesh, rules)]
        warn_of_wasted(f, *xs, mesh=mesh, rules=rules, shardings=split, policy=policy)
        return params, state_shardings(declared.state, mesh)

    return initial(f, key, *xs, data=data, policy=policy, place=placement(mesh, rules), shardings=shardings)
