"""`spec`: what variables a model has, without memory and without FLOPs."""

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


def spec(f: Callable, *xs: Any, policy=None) -> Spec:
    """The parameters and state that ``f(v, *xs)`` declares, in train and in eval mode together.

    ``xs`` are arrays or `jax.ShapeDtypeStruct`, in any pytree; what is no array (a number, a string) is passed on as
    it is. Nothing is computed. Raises `DeclarationError` where two declarations contradict each other.

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
    f: Callable, xs: tuple, recorder: Recorder, *, train: bool, policy=None, place=None, by: Callable = jax.eval_shape
) -> Any:
    """Run the model on shapes alone, its declarations going to ``recorder``; returns the shapes of its result, or what
    ``by(run, key, arrays)`` makes of that run."""

    arrays, rest = arrays_apart(xs)

    def run(key, arrays):
        v = bind({}, {}, rng=key, train=train, policy=as_policy(policy), place=place)
        y, _ = pure(f)(v._with(_recorder=weakref.ref(recorder)), *rest(arrays))
        return arrays_only(f, y)

    return by(run, jax.eval_shape(lambda: jax.random.key(0)), arrays)


def arrays_apart(xs: Any) -> tuple[list, Callable[[list], Any]]:
    """The arrays of a tree, which may be traced, and the function that puts them back among everything else."""
    leaves, tree = jax.tree.flatten(xs)
    is_array = [has_shape(leaf) for leaf in leaves]

    def whole(arrays: list) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(tree, [next(given) if a else x for a, x in zip(is_array, leaves, strict=True)])

    return [leaf for a, leaf in zip(is_array, leaves, strict=True) if a], whole
