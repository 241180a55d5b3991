"""Reading a jaxpr: the jaxprs inside an equation, and every equation however deep."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def inner(equation: Any) -> Iterator[Any]:
    """The jaxprs inside an equation: bodies, branches, jitted and checkpointed functions."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, and those inside them, however deep."""
    for equation in jaxpr.eqns:
        yield equation
        for body in inner(equation):
            yield from equations(body)


def holds(equation: Any, test: Callable[[Any], Any]) -> bool:
    """Whether the test is true of any equation inside this one, however deep."""
    return any(test(e) for jaxpr in inner(equation) for e in equations(jaxpr))


def is_literal(var: Any) -> bool:
    """Whether what stands in an equation is a constant, not a variable."""
    return hasattr(var, "val")
