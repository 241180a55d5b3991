"""`once`: a value that XLA computes once on a CPU and keeps, where it would compute it anew for each use."""

import jax
from jax import lax

from sapwood.core.platform import platform
from sapwood.core.traces import is_traced


def once(x: jax.Array) -> jax.Array:
    """x, computed once where we compile for a CPU; elsewhere x as it is.

    XLA's fusion on a CPU copies what leads up to a value, from the first residual branch on, into each operation that
    reads it. A step of 12 transformer blocks took a sixth longer by that and twice as long to compile; in a residual
    convolutional net each transposition for a kernel's gradient repeated all sums before it. An
    `optimization_barrier` is gone before XLA fuses; a call that may not be inlined stays, and costs no copy.
    A program that is exported on a CPU for another platform is traced within `sapwood.core.platform.compiling_for`.

    >>> import jax.numpy as jnp
    >>> once(jnp.array([1.0, 2.0]))
    Array([1., 2.], dtype=float32)
    """
    if platform() != "cpu" or not is_traced(x):
        return x
    from jax.experimental.xla_metadata import set_xla_metadata

    with set_xla_metadata(inlineable="false"):
        return _keep(x)


@jax.jit
def _keep(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)  # what does nothing at all JAX forwards, and there is no call
