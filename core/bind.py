"""`bind` makes a cursor from trees; `pure` runs a model on a cursor and returns its effects.

`apply` does both in one call. Each call of `pure` makes a new collector, and effects work only in the trace of that
call.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

from sapwood.core import paths
from sapwood.core.errors import EffectError
from sapwood.core.model_output import refuse_lazy
from sapwood.core.policy import as_policy
from sapwood.core.vars import Vars, _tree, as_vars, current_state, with_collector


def bind(
    params: Any, state: Any = None, *, rng: Any = None, train: bool = False, policy: Any = None, place: Any = None,
    capture: bool | str = True, frozen: Any = False,
) -> Vars:  # fmt: skip
    """A cursor at the root of ``params`` and ``state``.

    Args:
        params: nested dict of arrays.
        state: nested dict of arrays; None is empty.
        rng: random key or integer seed; None binds no key, and drawing raises `EffectError`.
        train: True for a training run.
        policy: a `Policy` or the name of a compute dtype; None casts nothing.
        place: ``place(axes, shape)`` returns the sharding of an activation; None constrains nothing.
        capture: which sown values a run returns: True (all), False (none), or a path pattern.
        frozen: which scopes train nothing: True (all), False (none), or pairs of a child's name and the same for that
            child. The trainer makes it; `sw.frozen` reads it.

    >>> import jax.numpy as jnp
    >>> v = bind({"dense": {"kernel": jnp.ones((2, 3))}})
    >>> v.dense.param("kernel", (2, 3), None).shape
    (2, 3)
    """
    v = Vars(
        _params=_tree(params, "params"), _state=_tree({} if state is None else state, "state"), _train=bool(train),
        _policy=as_policy(policy), _place=place, _capture=capture, _frozen=frozen,
    )  # fmt: skip
    return v if rng is None else v.replace(rng=rng)


def params(v: Vars) -> dict:
    """The parameters bound at a cursor, as a plain nested dict."""
    v = as_vars(v, "sw.params")
    if v._reads is not None and v._own_params:
        v._reads.update(("params", path) for path, _ in paths.leaves(v._params, v._path))
    return v._params


def state(v: Vars) -> dict:
    """The state at a cursor as a plain nested dict, with the values that this run has put so far."""
    v = as_vars(v, "sw.state")
    if v._reads is not None and v._own_state:
        v._reads.update(("state", path) for path, _ in paths.leaves(v._state, v._path))
    return current_state(v)


def pure(f: Callable, full: bool = False) -> Callable[..., tuple[Any, Any]]:
    """``f(v, *xs)`` as a function that returns its effects, too: ``(y, updates)``, with `Updates`.

    Inside any JAX transform, this makes ``v.put``, ``v.rng``, ``v.loss``, ``v.sow`` and ``v.check`` work. Outside of
    the transform, ``v.merge(updates)`` adds them to the run of ``v``.

    ``full=True`` returns ``(y, state)`` instead, with the whole next state of ``v``. Its structure is fixed, as the
    carries of ``cond``, ``while_loop`` and ``scan`` require. It holds no auxiliary losses, so a training run that makes
    some raises `EffectError`. It holds no checks, so the results of traced checks are dropped; return ``updates`` if
    they matter.

    >>> def count(v, x):
    ...     n = v.state("n", (), jax.nn.initializers.zeros)
    ...     v.put(n=n + 1)
    ...     return x * n
    >>> import jax, jax.numpy as jnp
    >>> y, updates = pure(count)(bind({}, {"n": jnp.ones(())}), 3.0)
    >>> float(y), float(updates.state["n"])
    (3.0, 2.0)
    """

    @functools.wraps(f, updated=())
    def run(v, *xs, **options):
        inner, collector = with_collector(as_vars(v, f))
        y = refuse_lazy(f, f(inner, *xs, **options))
        if not full:
            return y, collector.updates()
        refuse_lost_losses(collector.losses, inner)
        return y, current_state(inner)

    return run


def refuse_lost_losses(losses: Collection[paths.Path], v: Vars) -> None:
    """Raise `EffectError` if a training run made auxiliary losses that the caller does not return."""
    if losses and v.train:
        names = ", ".join(map(paths.join, losses))
        raise EffectError(
            f"the auxiliary losses {names} would be lost: only sw.pure(f)(v, ...) hands back updates.losses "
            "(sw.apply and full=True hand back the state alone)"
        )
