"""One loop for every repetition: `scan` decides between a compiled loop and unrolling.

On CPU, XLA runs a convolution inside a loop about 25 times slower than outside (jax-ml/jax#12868), and not with the
same bits. So there a body that holds a convolution is unrolled; everything else stays a loop.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from sapwood.core.jaxpr import equations
from sapwood.core.platform import platform


def scan(
    body: Callable, init: Any, xs: Any, length: int | None = None, *, looped: Callable | None = None
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, init, xs, length)`, unrolled on CPU where the body holds a convolution.

    On CPU the body is traced once more to find out. `looped` is what to take in its place where it is a loop on CPU
    and has no effects, such as a `jax.debug.print`, which would not happen as often.

    >>> import jax.numpy as jnp
    >>> scan(lambda total, x: (total + x, total), jnp.zeros(()), jnp.arange(3.0))
    (Array(3., dtype=float32), Array([0., 0., 1.], dtype=float32))
    """
    if platform() != "cpu":
        return lax.scan(body, init, xs, length)
    xs, tree = jax.tree.flatten(xs)  # once: a cursor has other keys for each crossing

    def flat(body: Callable) -> Callable:
        return lambda carry, leaves: body(carry, jax.tree.unflatten(tree, leaves))

    body = flat(body)
    traced = _traced(body, init, xs, length)
    unroll = _convolves(traced)
    if looped is not None and not unroll and not traced.effects:
        body = flat(looped)
    return lax.scan(body, init, xs, length, unroll=unroll)


def unrolls(body: Callable, init: Any, xs: Any, length: int | None = None) -> bool:
    """Whether `scan` unrolls this body: we compile for CPU and it holds a convolution, however deep."""
    return platform() == "cpu" and _convolves(_traced(body, init, xs, length))


def _traced(body: Callable, init: Any, xs: Any, length: int | None) -> Any:
    return jax.make_jaxpr(lambda init, xs: lax.scan(body, init, xs, length))(init, xs)


def _convolves(traced: Any) -> bool:
    return any(equation.primitive.name == "conv_general_dilated" for equation in equations(traced.jaxpr))
