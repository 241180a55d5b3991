"""`apply`: run a model once on its parameters and state, and get its result and its next state."""

from collections.abc import Callable
from typing import Any, overload

from sapwood.core import paths
from sapwood.core.bind import bind, pure, refuse_to_lose
from sapwood.core.errors import DeclarationError
from sapwood.core.vars import Vars


@overload
def apply(
    f, params, state, *xs, rng=None, train=False, policy=None, capture: None = None, place=None
) -> tuple[Any, dict]: ...


@overload
def apply(
    f, params, state, *xs, rng=None, train=False, policy=None, capture: bool | str, place=None
) -> tuple[Any, dict, dict]: ...


def apply(f, params, state, *xs, rng=None, train=False, policy=None, capture=None, place=None):
    """Run ``f(v, *xs)`` on ``params`` and ``state``; returns ``(y, next_state)``.

    With ``capture`` (True, or a path pattern such as ``"blocks/*/attn"``) it returns ``(y, next_state, captured)``,
    where ``captured`` holds what the model sowed there. A failed ``v.check`` raises where values are known; under
    `jax.jit` only `pure` hands the checks back. Raises `DeclarationError` for an entry that is missing, has
    another shape, or that nothing in the model declares.

    >>> import jax.numpy as jnp
    >>> apply(lambda v, x: x @ v.param("w", (2, 1), None), {"w": jnp.ones((2, 1))}, {}, jnp.ones((1, 2)))
    (Array([[2.]], dtype=float32), {})
    """
    v = bind(params, state, rng=rng, train=train, policy=policy, place=place, capture=capture or False)
    v = v._with(_reads=set())
    if capture:
        y, updates = pure(f)(v, *xs)
        refuse_to_lose([path for path, _ in paths.leaves(updates.losses)], v)
        next_state, captured = paths.overlay(v._state, updates.state), updates.captured
    else:
        y, next_state = pure(f, full=True)(v, *xs)
        captured = None
    _refuse_undeclared(f, v, xs)
    return (y, next_state, captured) if capture else (y, next_state)


def _refuse_undeclared(f: Callable, v: Vars, xs: tuple) -> None:
    """Raise for entries that no mode of the model declares. What was read is known, so this rarely traces again."""
    bound = {("params", path) for path, _ in paths.leaves(v._params)}
    bound |= {("state", path) for path, _ in paths.leaves(v._state)}
    unread = bound - (v._reads or set())
    if not unread:
        return
    from sapwood.core.spec import spec

    declared = spec(f, *xs, policy=v.policy)
    known = {(kind, path) for kind in ("params", "state") for path, _ in paths.leaves(getattr(declared, kind))}
    extra = sorted(f"{kind} {paths.join(path)}" for kind, path in unread - known)
    if extra:
        free = [paths.join(path) for _, path in sorted(known - bound)]
        hint = f"; it declares {', '.join(free[:3])} instead" if free else ""
        raise DeclarationError(
            f"{getattr(f, '__name__', f)!r} declares no {', '.join(extra[:5])}"
            + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            + hint
        )
