"""Floating-point operations of traced equations, by XLA's own cost analysis.

XLA counts the body of a loop once, however often it runs, so `FlopCounter` splits loops itself. A `scan` counts its
body times its length. A `while` counts its condition and body once, since the number of iterations is unknown. A `cond`
counts its costliest branch. The equations between loops are lowered for the CPU: there no kernel hides its operations
from XLA.
"""

from collections.abc import Sequence
from typing import Any

import jax

from sapwood.core.errors import ConfigError
from sapwood.core.jaxpr import holds, inner, is_literal

_LOOPS = ("scan", "while", "cond")


class FlopCounter:
    """Counts the floating-point operations of equations. Equal groups of equations are lowered only once."""

    def __init__(self):
        self._known: dict[str, int] = {}

    def count(self, equations: Sequence[Any]) -> int:
        """The floating-point operations of some equations of one jaxpr, each run once.

        Raises `ConfigError` for symbolic dimensions.
        """
        plain = [e for e in equations if not self._is_loop(e)]
        return self._lowered(plain) + sum(self._loop(e) for e in equations if self._is_loop(e))

    def _is_loop(self, equation: Any) -> bool:
        is_loop = lambda e: e.primitive.name in _LOOPS  # noqa: E731
        return is_loop(equation) or holds(equation, is_loop)

    def _loop(self, equation: Any) -> int:
        """The operations of an equation that is a loop or holds one at any depth."""
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
    """A jaxpr of some equations of another jaxpr.

    Its inputs are the variables that these equations read and do not define. Its outputs are the variables that they
    define and do not read.
    """
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
    return max(0, round((cost or {}).get("flops", 0)))  # XLA gives -1 for a call that it cannot look into
