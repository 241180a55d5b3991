"""Rematerialization: compute intermediate values again in the backward pass instead of storing them.

`Remat` wraps one layer, and `Scan` takes the same policies. `checkpoint` is `jax.checkpoint` for functions of a cursor,
which may also take arguments that are no arrays.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from sapwood.core.bind import pure
from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.messages import nearest
from sapwood.core.spec import arrays_apart
from sapwood.core.vars import Vars

POLICIES = {
    "full": "nothing_saveable",
    "minimal": "dots_with_no_batch_dims_saveable",
    "offload": "offload_dot_with_no_batch_dims",
    "nothing_saveable": "nothing_saveable",
    "everything_saveable": "everything_saveable",
    "dots_saveable": "dots_saveable",
    "dots_with_no_batch_dims_saveable": "dots_with_no_batch_dims_saveable",
}
"""Names of policies in `jax.checkpoint_policies`. A policy that needs arguments is passed as a callable instead.

"full" and "minimal", the two that matter for transformers, are MaxText's names. "full" recomputes everything, "minimal"
everything but the matrix products with weights. "offload" saves what "minimal" saves, but in host memory, from which
the backward pass fetches it. On a CPU, host and device memory are the same.
"""


def policy(value: str | Callable | None) -> Callable | None:
    """The checkpoint policy for a name in `POLICIES`. A callable or None is returned unchanged.

    Raises `ConfigError` for anything else.

    >>> policy("dots_savable")
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: 'dots_savable' is no remat policy; did you mean 'dots_saveable'? Give one of \
full, minimal, offload, nothing_saveable, everything_saveable, dots_saveable, dots_with_no_batch_dims_saveable or a \
function such as those in jax.checkpoint_policies
    """
    if value == "offload":
        return jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    if isinstance(value, str) and value in POLICIES:
        return getattr(jax.checkpoint_policies, POLICIES[value])
    if value is None or (callable(value) and not isinstance(value, str)):
        return value
    hint = nearest(str(value), POLICIES, 1) or "."
    raise ConfigError(
        f"{value!r} is no remat policy{hint} Give one of {', '.join(POLICIES)} or a function such as those in "
        "jax.checkpoint_policies"
    )


def checkpoint(f: Callable, saved: str | Callable | None, prevent_cse: bool = True) -> Callable:
    """Wrap `f(v, *xs, **options)` in `jax.checkpoint` with the policy `saved`.

    Only the arrays among the arguments go through `jax.checkpoint`. Other values, such as a flag or a name, reach `f`
    unchanged, since JAX would trace or reject them. `prevent_cse` is that of `jax.checkpoint`.
    """
    again = functools.partial(jax.checkpoint, policy=policy(saved), prevent_cse=prevent_cse)
    plain = again(f)

    def run(v: Vars, *xs: Any, **options: Any) -> Any:
        arrays, whole = arrays_apart((xs, options))
        if len(arrays) == len(jax.tree.leaves((xs, options))):
            return plain(v, *xs, **options)  # the same function each time, so JAX reuses its trace

        def among(v: Vars, arrays: list) -> Any:
            xs, options = whole(arrays)
            return f(v, *xs, **options)

        return again(among)(v, arrays)

    return run


class Remat(Layer):
    """Apply `layer` with rematerialization: the backward pass recomputes the values that `policy` does not save.

    This takes less memory and more compute. The result is the same, dropout included. `policy` is a name in `POLICIES`
    or a callable from `jax.checkpoint_policies`; None saves only the layer's inputs. The wrapped layer keeps its scope,
    so wrapping it changes no variable path. Raises `ConfigError` for an unknown policy.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174).

    >>> import jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> Remat(L.Dense(1, bias=False))({"kernel": jnp.ones((3, 1))}, jnp.ones(3))
    Array([3.], dtype=float32)
    """

    layer: Callable
    policy: str | Callable | None = None

    def __post_init__(self) -> None:
        policy(self.policy)

    def __call__(self, v: Vars, *xs: Any, **options: Any) -> Any:
        y, updates = checkpoint(pure(self.layer), self.policy)(v.fork(), *xs, **options)
        v.merge(updates)
        return y
