"""Floating-point operations of traced equations, by XLA's own cost analysis.

XLA counts the body of a loop once, however often it runs. So loops are taken apart here: a scan counts its body times
its length, `while` its body once (nobody knows how often it runs), `cond` its costliest branch. What is left between
them is lowered as it is, for the CPU, where every operation is one that XLA can see into.
"""

from collections.abc import Sequence
from typing import Any

import jax

from sapwood.core.errors import ConfigError
from sapwood.core.jaxpr import holds, inner, is_literal

_LOOPS = ("scan", "while", "cond")


class FlopCounter:
    """Counts equations; equal ones are lowered once."""

    def __init__(self):
        self._known: dict[str, int] = {}

    def count(self, equations: Sequence[Any]) -> int:
        """The operations of some equations of one jaxpr, run once."""
        plain = [e for e in equations if not self._is_loop(e)]
        return self._lowered(plain) + sum(self._loop(e) for e in equations if self._is_loop(e))

    def _is_loop(self, equation: Any) -> bool:
        is_loop = lambda e: e.primitive.name in _LOOPS  # noqa: E731
        return is_loop(equation) or holds(equation, is_loop)

    def _loop(self, equation: Any) -> int:
        """An equation that is a loop, or a function with a loop somewhere in it."""
        bodies = [self.count(jaxpr.eqns) for jaxpr in inner(equation)]
        name = equation.primitive.name
        if name == "cond":
            return max(bodies)
        return sum(bodies) * (equation.params["length"] if name == "scan" else 1)

    def _lowered(self, equations: list[Any]) -> int:
        if not equations:
            return 0
        region = _region(equations)
        text = str(region)
        if text not in self._known:
            self._known[text] = _cost(region)
        return self._known[text]


def _region(equations: list[Any]) -> Any:
    """Some equations of a jaxpr as a jaxpr of their own."""
    from jax.extend.core import DebugInfo, Jaxpr

    made = {var for e in equations for var in e.outvars}
    read = dict.fromkeys(var for e in equations for var in e.invars if not is_literal(var))
    given = [var for var in read if var not in made]
    unread = [var for e in equations for var in e.outvars if var not in read and type(var).__name__ != "DropVar"]
    names = DebugInfo("summary", "sapwood.inspection.flops", ("",) * len(given), ("",) * len(unread))
    return Jaxpr((), given, unread, equations, debug_info=names)


def _cost(region: Any) -> int:
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

    symbolic = [str(var.aval) for var in region.invars if not all(isinstance(n, int) for n in var.aval.shape)]
    if symbolic:
        raise ConfigError(
            f"FLOPs are counted of sizes that are numbers, and {symbolic[0]} has symbolic ones; give arrays or a "
            "jax.ShapeDtypeStruct of an example's size"
        )
    structs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in region.invars]
    run = jax.jit(jaxpr_as_fun(ClosedJaxpr(region, ())))
    cost = run.trace(*structs).lower(lowering_platforms=("cpu",)).cost_analysis()
    return max(0, round((cost or {}).get("flops", 0)))  # XLA counts a call of what it does not know as -1
