"""Functions that read a jaxpr: its equations at every depth, and the jaxprs inside an equation."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def inner(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters: loop bodies, branches, jitted and checkpointed functions."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, each followed by the equations inside it, at every depth."""
    for equation in jaxpr.eqns:
        yield equation
        for body in inner(equation):
            yield from equations(body)


def holds(equation: Any, test: Callable[[Any], Any]) -> bool:
    """True if ``test`` is true of any equation inside this one, at any depth. The equation itself is not tested."""
    return any(test(e) for jaxpr in inner(equation) for e in equations(jaxpr))


def is_literal(var: Any) -> bool:
    """True if an operand of an equation is a literal constant, not a variable."""
    return hasattr(var, "val")
