"""`spec`: the variables that a model declares, found by tracing shapes, without memory and without FLOPs.

`spec` runs the model twice, in train and in eval mode. A `Recorder` gathers the declarations. `trace` is one such run;
other rooms call it with recorders of their own.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sapwood.core.bind import bind, pure
from sapwood.core.declare import Recorder
from sapwood.core.model_output import arrays as arrays_only
from sapwood.core.model_output import has_shape
from sapwood.core.policy import as_policy


class Spec(NamedTuple):
    """The variables of a model: two nested dicts whose leaves are `Param`."""

    params: dict
    state: dict


def spec(f: Callable, *xs: Any, policy: Any = None) -> Spec:
    """The parameters and state that ``f(v, *xs)`` declares, in train and in eval mode together.

    ``xs`` are pytrees of arrays or `jax.ShapeDtypeStruct`. Leaves that are no arrays (a number, a string) are passed to
    the model unchanged. Nothing is computed. Raises `DeclarationError` if two declarations contradict each other.

    >>> import jax.numpy as jnp
    >>> def model(v, x):
    ...     return x @ v.head.param("kernel", (x.shape[-1], 10), jax.nn.initializers.lecun_normal())
    >>> spec(model, jax.ShapeDtypeStruct((8, 4), jnp.float32)).params["head"]["kernel"].shape
    (4, 10)
    """
    recorder = Recorder()
    for train in (True, False):
        trace(f, xs, recorder, train=train, policy=policy)
    return Spec(recorder.tree("params"), recorder.tree("state"))


def trace(
    f: Callable,
    xs: tuple,
    recorder: Recorder,
    *,
    train: bool,
    policy: Any = None,
    place: Any = None,
    by: Callable = jax.eval_shape,
) -> Any:
    """Trace the model on shapes and send its declarations to ``recorder``.

    Args:
        f: the model.
        xs: its inputs, as in `spec`.
        recorder: receives the declarations, and the events that it has callbacks for.
        train: True traces train mode, False eval mode.
        policy: a `Policy` or the name of a compute dtype.
        place: ``place(axes, shape)`` returns the sharding of an activation.
        by: traces ``run(key, arrays)``; it is called as ``by(run, key, arrays)``.

    Returns:
        The result of ``by``: with the default `jax.eval_shape`, the shapes of the model's result.
    """

    arrays, rest = arrays_apart(xs)

    def run(key, arrays):
        v = bind({}, {}, rng=key, train=train, policy=as_policy(policy), place=place)
        y, _ = pure(f)(v._with(_recorder=weakref.ref(recorder)), *rest(arrays))
        return arrays_only(f, y)

    return by(run, jax.eval_shape(lambda: jax.random.key(0)), arrays)


def arrays_apart(xs: Any) -> tuple[list, Callable[[list], Any]]:
    """The arrays of a pytree, and a function from such arrays to the whole pytree with its other leaves."""
    leaves, tree = jax.tree.flatten(xs)
    is_array = [has_shape(leaf) for leaf in leaves]

    def whole(arrays: list) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(tree, [next(given) if a else x for a, x in zip(is_array, leaves, strict=True)])

    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], whole
