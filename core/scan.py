"""`scan`: `jax.lax.scan`, unrolled on CPU if its body holds a convolution.

On CPU, XLA runs a convolution inside a loop about 25 times slower than outside (jax-ml/jax#12868), and not with the
same bits. Every other body stays a compiled loop. Code that loops over a body which may hold a convolution uses this
function.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from sapwood.core.jaxpr import equations
from sapwood.core.target_platform import platform


def scan(
    body: Callable, init: Any, xs: Any, length: int | None = None, *, looped: Callable | None = None
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, init, xs, length)`, unrolled on CPU if the body holds a convolution.

    On CPU the body is traced one more time, to find convolutions.

    Args:
        body: ``body(carry, x)`` returns ``(carry, y)``.
        init: the first carry.
        xs: pytree of arrays that are scanned along their first dimension; or None.
        length: the number of steps; None takes it from `xs`.
        looped: a body that replaces `body` if the loop runs on CPU and is not unrolled. None keeps `body`. A `body`
            with effects, such as `jax.debug.print`, is not replaced, because `looped` may run the effects a different
            number of times.

    >>> import jax.numpy as jnp
    >>> scan(lambda total, x: (total + x, total), jnp.zeros(()), jnp.arange(3.0))
    (Array(3., dtype=float32), Array([0., 0., 1.], dtype=float32))
    """
    if platform() != "cpu":
        return lax.scan(body, init, xs, length)
    xs, tree = jax.tree.flatten(xs)  # once: each flattening gives a cursor (`Vars`) new keys

    def flat(body: Callable) -> Callable:
        return lambda carry, leaves: body(carry, jax.tree.unflatten(tree, leaves))

    body = flat(body)
    traced = _traced(body, init, xs, length)
    unroll = _convolves(traced)
    if looped is not None and not unroll and not traced.effects:
        body = flat(looped)
    return lax.scan(body, init, xs, length, unroll=unroll)


def unrolls(body: Callable, init: Any, xs: Any, length: int | None = None) -> bool:
    """True if `scan` unrolls this body: the platform is CPU, and the body holds a convolution at any depth."""
    return platform() == "cpu" and _convolves(_traced(body, init, xs, length))


def _traced(body: Callable, init: Any, xs: Any, length: int | None) -> Any:
    return jax.make_jaxpr(lambda init, xs: lax.scan(body, init, xs, length))(init, xs)


def _convolves(traced: Any) -> bool:
    return any(equation.primitive.name == "conv_general_dilated" for equation in equations(traced.jaxpr))
