"""Remat: forget intermediate values in the forward pass and compute them again in the backward pass."""

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
"""Policies of `jax.checkpoint_policies` by name; others, which need arguments, are given as callables.

The two that matter for transformers have MaxText's names, too: "full" computes everything again, "minimal" everything
but the matrix products with weights. "offload" keeps what "minimal" keeps in the host's memory, from where the backward
pass fetches it. (On a CPU that is the same memory.)
"""


def policy(value: str | Callable | None) -> Callable | None:
    """The policy of that name in `POLICIES`; a callable is one itself.

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
    """`jax.checkpoint` of `f(v, *xs, **options)` under the policy `saved`, for arrays alone.

    What else is given, such as a flag or a name, `f` gets as it is: JAX would trace it, or refuse it.
    """
    again = functools.partial(jax.checkpoint, policy=policy(saved), prevent_cse=prevent_cse)
    plain = again(f)

    def run(v: Vars, *xs: Any, **options: Any) -> Any:
        arrays, whole = arrays_apart((xs, options))
        if len(arrays) == len(jax.tree.leaves((xs, options))):
            return plain(v, *xs, **options)  # JAX keeps its trace, by the function

        def among(v: Vars, arrays: list) -> Any:
            xs, options = whole(arrays)
            return f(v, *xs, **options)

        return again(among)(v, arrays)

    return run


class Remat(Layer):
    """`layer` with less memory and more compute: what `policy` does not save is computed again for the gradient.

    The result is the same, dropout included. `policy` is the name of one in `POLICIES`, or a callable from
    `jax.checkpoint_policies`; None saves the inputs alone. The layer keeps its scope: wrapping it changes no path.
    Raises `ConfigError` for an unknown policy. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"
    (arXiv:1604.06174).

    >>> import jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> Remat(L.Dense(1, bias=False))({"kernel": jnp.ones((3, 1))}, jnp.ones(3))
    Array([3.], dtype=float32)
    """

    layer: Callable
    policy: str | Callable | None = None

    def __post_init__(self):
        policy(self.policy)

    def __call__(self, v: Vars, *xs: Any, **options: Any) -> Any:
        y, updates = checkpoint(pure(self.layer), self.policy)(v.fork(), *xs, **options)
        v.merge(updates)
        return y
