"""`apply`: run a model once on its parameters and state; it returns the result and the next state.

After the run it compares the bound variables with those that were read. Only if some were not read does it call `spec`,
to tell variables of another mode from variables that the model does not declare.
"""

from collections.abc import Callable
from typing import Any, overload

from sapwood.core import paths
from sapwood.core.bind import bind, pure, refuse_lost_losses
from sapwood.core.errors import DeclarationError
from sapwood.core.vars import Vars


@overload
def apply(
    f: Callable, params: Any, state: Any, *xs: Any, rng: Any = None, train: bool = False, policy: Any = None,
    capture: None = None, place: Any = None,
) -> tuple[Any, dict]: ...  # fmt: skip


@overload
def apply(
    f: Callable, params: Any, state: Any, *xs: Any, rng: Any = None, train: bool = False, policy: Any = None,
    capture: bool | str, place: Any = None,
) -> tuple[Any, dict, dict]: ...  # fmt: skip


def apply(
    f: Callable, params: Any, state: Any, *xs: Any, rng: Any = None, train: bool = False, policy: Any = None,
    capture: bool | str | None = None, place: Any = None,
) -> Any:  # fmt: skip
    """Run ``f(v, *xs)`` on ``params`` and ``state``; returns ``(y, next_state)``.

    Args:
        f: the model, a function or a layer.
        params: nested dict of arrays.
        state: nested dict of arrays.
        xs: the inputs of the model.
        rng: random key or integer seed; None binds no key.
        train: True for a training run.
        policy: a `Policy` or the name of a compute dtype; None casts nothing.
        capture: True, or a path pattern such as ``"blocks/*/attn"``: which sown values to return. None returns none.
        place: ``place(axes, shape)`` returns the sharding of an activation; None constrains nothing.

    Returns:
        ``(y, next_state)``, or with ``capture`` ``(y, next_state, captured)``, where ``captured`` is a nested dict of
        the sown values.

    Raises:
        DeclarationError: an entry is missing, has another shape, or is declared by nothing in the model.
        CheckError: a ``v.check`` of known values failed. Under `jax.jit` only `pure` returns the checks.
        EffectError: a training run made auxiliary losses; use `pure`, which returns them.

    >>> import jax.numpy as jnp
    >>> apply(lambda v, x: x @ v.param("w", (2, 1), None), {"w": jnp.ones((2, 1))}, {}, jnp.ones((1, 2)))
    (Array([[2.]], dtype=float32), {})
    """
    v = bind(params, state, rng=rng, train=train, policy=policy, place=place, capture=capture or False)
    v = v._with(_reads=set())
    if capture:
        y, updates = pure(f)(v, *xs)
        refuse_lost_losses([path for path, _ in paths.leaves(updates.losses)], v)
        next_state, captured = paths.overlay(v._state, updates.state), updates.captured
    else:
        y, next_state = pure(f, full=True)(v, *xs)
        captured = None
    _refuse_undeclared(f, v, xs)
    return (y, next_state, captured) if capture else (y, next_state)


def _refuse_undeclared(f: Callable, v: Vars, xs: tuple) -> None:
    """Raise `DeclarationError` for bound entries that the model declares in neither train nor eval mode.

    An entry that was read is declared. The model is traced again only if entries were not read.
    """
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
