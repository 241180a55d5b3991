"""The current JAX trace, and which values belong to it: effects and keys of one trace must not reach another.

It reads attributes of JAX's trace objects that are not documented (`parent_trace`, `frame.debug_info.traced_for`,
`axis_data`). A new JAX version may rename them, so check here first.
"""

import functools
import weakref
from typing import Any

import jax.core

_DIFFERENTIATION = ("JVPTrace", "LinearizeTrace", "JaxprTrace")
"""Trace classes of `jax.grad` and related transforms. They run the function once, inside the trace around them."""

_LOOPS = {"scan": "jax.lax.scan", "while_body": "jax.lax.while_loop", "fori_loop": "jax.lax.fori_loop"}


@functools.cache
def _extend() -> Any:
    import jax.extend.core as extend  # loads Pallas: a quarter of what `import sapwood` would cost

    return extend


def _innermost() -> Any:
    return _extend().find_top_trace(())


def current_trace() -> Any:
    """An opaque mark of the current JAX trace. Two marks are equal only within one trace."""
    return _extend().get_opaque_trace_state(convention="sapwood")


def is_traced(x: Any) -> bool:
    """True if ``x`` is a tracer, whose value is not known yet."""
    return isinstance(x, jax.core.Tracer)


def _home() -> Any:
    """The innermost trace that is no differentiation."""
    trace = _innermost()
    while type(trace).__name__ in _DIFFERENTIATION:
        trace = trace.parent_trace
    return trace


def home() -> Any:
    """A mark of the trace in which keys are drawn: the innermost one that is no differentiation.

    So the mark is the same inside and outside of `jax.grad` and `jax.jvp`. It is a weak reference.
    """
    return weakref.ref(_home())


def is_eager() -> bool:
    """True if operations run eagerly, one by one. False if they become part of a traced program."""
    trace = _innermost()
    while trace is not None and not hasattr(trace, "frame"):  # a trace with a frame records equations
        trace = getattr(trace, "parent_trace", None)
    return trace is None


def belongs_here(x: Any) -> bool:
    """True if ``x`` is a value of the trace in which keys are drawn (see `home`), False if of a trace around it."""
    trace, owner = _innermost(), _home()
    while trace is not owner:
        if getattr(x, "_trace", None) is trace:
            return True
        trace = trace.parent_trace
    return x._trace is owner if is_traced(x) else type(owner).__name__ == "EvalTrace"


def repeats(x: Any) -> str:
    """The name of the surrounding transform that uses ``x`` for many rows or steps; empty if none is found.

    JAX traces a jitted function once, so inside such a function this sees the transforms around its first call.
    """
    trace, owner = _innermost(), getattr(x, "_trace", None)
    while trace is not None and trace is not owner:
        if name := _repeating(trace):
            return name
        trace = getattr(trace, "parent_trace", None)
    return ""


def inside() -> str:
    """The name of the current transform if it runs its function for many rows or steps (vmap, loops), else empty."""
    return _repeating(_home())


def _repeating(trace: Any) -> str:
    return "jax.vmap" if hasattr(trace, "axis_data") else _LOOPS.get(_traced_for(trace), "")


def is_condition() -> bool:
    """True inside the condition of a `jax.lax.while_loop`."""
    return _traced_for(_home()) == "while_cond"


def _traced_for(trace: Any) -> str:
    """The purpose of a trace, by the name that JAX's messages use: "jit", "scan", ...; empty if it has none."""
    debug_info = getattr(getattr(trace, "frame", None), "debug_info", None)
    return getattr(debug_info, "traced_for", "")


def manual_axes() -> frozenset[str]:
    """The mesh axes, of more than one device, that the surrounding `jax.shard_map` maps the function over."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(name for name in mesh.manual_axes if mesh.shape[name] > 1)
