"""Running a model: `bind` a cursor, `pure` to hand effects back, `apply` for both in one call."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from sapwood.core import paths
from sapwood.core.errors import EffectError
from sapwood.core.model_output import computed
from sapwood.core.policy import as_policy
from sapwood.core.vars import Vars, _tree, as_vars, collecting, current_state


def bind(params, state=None, *, rng=None, train=False, policy=None, place=None, capture: bool | str = True,
         frozen: Any = False) -> Vars:  # fmt: skip
    """A cursor at the root of ``params`` and ``state`` (nested dicts of arrays).

    ``rng`` is a key or a seed, ``policy`` a `Policy` or compute dtype, ``place(axes, shape)`` gives the sharding of
    an activation, ``capture`` chooses by path pattern which sown values a run hands back, and ``frozen`` says which
    scopes train nothing: True, or pairs of a name and this again (a trainer makes them; `sw.frozen` asks).

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
    """The state at a cursor as a plain nested dict, with what this run has put so far."""
    v = as_vars(v, "sw.state")
    if v._reads is not None and v._own_state:
        v._reads.update(("state", path) for path, _ in paths.leaves(v._state, v._path))
    return current_state(v)


def pure(f: Callable, full: bool = False) -> Callable[..., tuple[Any, Any]]:
    """``f(v, *xs)`` as a function that hands its effects back: ``(y, updates)``.

    Inside any JAX transform this is what makes ``v.put``, ``v.rng``, ``v.loss``, ``v.sow`` and ``v.check`` work;
    outside, ``v.merge(updates)`` takes them over. ``full=True`` gives ``(y, state)`` instead, with the whole next
    state of ``v``: one fixed structure, as the carries of ``cond``, ``while_loop`` and ``scan`` need it. It has no
    place for auxiliary losses, so a training run that makes some raises `EffectError`; and none for what traced
    checks found, which are dropped: where they matter, hand ``updates`` back.

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
        inner, collector = collecting(as_vars(v, f))
        y = computed(f, f(inner, *xs, **options))
        if not full:
            return y, collector.updates()
        refuse_to_lose(collector.losses, inner)
        return y, current_state(inner)

    return run


def refuse_to_lose(losses: Collection[paths.Path], v: Vars) -> None:
    """Raise where a training run made auxiliary losses that nothing hands back."""
    if losses and v.train:
        names = ", ".join(map(paths.join, losses))
        raise EffectError(
            f"the auxiliary losses {names} would be lost: only sw.pure(f)(v, ...) hands back updates.losses "
            "(sw.apply and full=True hand back the state alone)"
        )
