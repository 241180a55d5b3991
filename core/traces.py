"""Which JAX trace we are in, and what belongs to it: effects and keys of one trace must not reach another."""

import functools
import weakref
from typing import Any

import jax.core

_DIFFERENTIATION = ("JVPTrace", "LinearizeTrace", "JaxprTrace")
"""Traces of `jax.grad` and its kin: they run the function once, in the midst of the trace around them."""

_LOOPS = {"scan": "jax.lax.scan", "while_body": "jax.lax.while_loop", "fori_loop": "jax.lax.fori_loop"}


@functools.cache
def _extend() -> Any:
    import jax.extend.core as extend  # loads Pallas: a quarter of what `import sapwood` would cost

    return extend


def _innermost() -> Any:
    return _extend().find_top_trace(())


def current_trace() -> Any:
    """An opaque mark of the JAX trace we are in; equal only within one trace."""
    return _extend().get_opaque_trace_state(convention="sapwood")


def is_traced(x: Any) -> bool:
    """Whether the value is not known yet."""
    return isinstance(x, jax.core.Tracer)


def _home() -> Any:
    """The trace we are in, without the differentiations inside it."""
    trace = _innermost()
    while type(trace).__name__ in _DIFFERENTIATION:
        trace = trace.parent_trace
    return trace


def home() -> Any:
    """A mark of the trace in which keys are drawn: the one we are in, seen from within `jax.grad` or `jax.jvp`, too."""
    return weakref.ref(_home())


def is_run_at_once() -> bool:
    """Whether each operation runs by itself as it is met, rather than become a part of a program."""
    trace = _innermost()
    while trace is not None and not hasattr(trace, "frame"):  # where equations are written down
        trace = getattr(trace, "parent_trace", None)
    return trace is None


def belongs_here(x: Any) -> bool:
    """Whether ``x`` is a value of the trace in which keys are drawn, not one of a trace around it."""
    trace, owner = _innermost(), _home()
    while trace is not owner:
        if getattr(x, "_trace", None) is trace:
            return True
        trace = trace.parent_trace
    return x._trace is owner if is_traced(x) else type(owner).__name__ == "EvalTrace"


def repeats(x: Any) -> str:
    """The transform around us that uses ``x`` for many rows or steps, by its name; empty where none is seen.

    JAX traces a jitted function once, so inside of one this sees what was around its first call.
    """
    trace, owner = _innermost(), getattr(x, "_trace", None)
    while trace is not None and trace is not owner:
        if name := _repeating(trace):
            return name
        trace = getattr(trace, "parent_trace", None)
    return ""


def inside() -> str:
    """The transform whose trace we are in, by its name, if it runs what it traces for many rows or steps."""
    return _repeating(_home())


def _repeating(trace: Any) -> str:
    return "jax.vmap" if hasattr(trace, "axis_data") else _LOOPS.get(_traced_for(trace), "")


def is_condition() -> bool:
    """Whether we are in the condition of a `jax.lax.while_loop`."""
    return _traced_for(_home()) == "while_cond"


def _traced_for(trace: Any) -> str:
    """What JAX made the trace for, as its messages say it: "jit", "scan", ...; empty where it does not say."""
    debug_info = getattr(getattr(trace, "frame", None), "debug_info", None)
    return getattr(debug_info, "traced_for", "")


def manual_axes() -> frozenset[str]:
    """The mesh axes over which a `jax.shard_map` around us runs the function on each device by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(name for name in mesh.manual_axes if mesh.shape[name] > 1)
