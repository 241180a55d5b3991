"""Which JAX trace we are in, and what belongs to it: effects and keys of one trace must not reach another."""

import functools
from typing import Any

import jax.core


@functools.cache
def _extend() -> Any:
    import jax.extend.core as extend  # loads Pallas: a quarter of what `import sapwood` would cost

    return extend


def current_trace() -> Any:
    """An opaque mark of the JAX trace we are in; equal only within one trace."""
    return _extend().get_opaque_trace_state(convention="sapwood")


def is_traced(x: Any) -> bool:
    """Whether the value is not known yet."""
    return isinstance(x, jax.core.Tracer)


def belongs_here(x: Any) -> bool:
    """Whether ``x`` is a traced value of the very trace we are in, so that it differs from step to step of a loop."""
    return is_traced(x) and x._trace is _extend().find_top_trace(())


def shared_by_rows(x: Any) -> bool:
    """Whether a `jax.vmap` around us leaves ``x`` the same for every row."""
    trace, owner = _extend().find_top_trace(()), getattr(x, "_trace", None)
    while trace is not None and trace is not owner:
        if hasattr(trace, "axis_data"):  # a vmap, and x is no value of its
            return True
        trace = getattr(trace, "parent_trace", None)
    return False
