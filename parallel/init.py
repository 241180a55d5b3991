"""Arrays born sharded: initialisation as one compiled program whose outputs already lie where they belong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from sapwood.core.init import init as initial
from sapwood.core.rng import as_key
from sapwood.core.spec import spec
from sapwood.parallel.mesh import AnyMesh
from sapwood.parallel.place import placement
from sapwood.parallel.rules import Rules, resolve
from sapwood.parallel.shardings import param_shardings, state_shardings


def init(
    f: Callable,
    key: Any,
    *xs: Any,
    mesh: AnyMesh,
    rules: Rules | str | None = None,
    policy: Any = None,
    data: bool = False,
) -> tuple[dict, dict]:
    """`sapwood.init` on a mesh: the same values bit for bit, and no device holds a sharded parameter whole.

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
    declared = spec(f, *xs, policy=policy)
    shardings = param_shardings(declared.params, mesh, rules), state_shardings(declared.state, mesh)
    if data:
        make = partial(initial, f, data=True, policy=policy, place=placement(mesh, rules))
        return jax.jit(make, out_shardings=shardings)(as_key(key), *xs)
    shapes = jax.eval_shape(lambda *xs: xs, *xs)  # an example input is not to become a constant of the program
    make = partial(initial, f, policy=policy)
    return jax.jit(lambda key: make(key, *shapes), out_shardings=shardings)(as_key(key))
