"""`compute_once`: make XLA compute a value once on a CPU, where its fusion would recompute the value for each use.

Norms and convolutions call `compute_once` on their inputs. It returns its argument, and has no effect on other
platforms.
"""

import jax
from jax import lax

from sapwood.core.target_platform import platform
from sapwood.core.traces import is_traced


def compute_once(x: jax.Array) -> jax.Array:
    """Return x; in a program for a CPU, XLA then computes x once instead of once for each use.

    XLA's CPU fusion copies the computation of a value, back to the first residual branch, into each operation that
    reads the value. That made a step of 12 transformer blocks a sixth slower and doubled its compile time. In a
    residual convolutional net, each transposition for a kernel's gradient repeated all sums before it.

    An `optimization_barrier` does not help: XLA removes it before it fuses. A call that may not be inlined stays, and
    costs no copy. A program that is exported on a CPU for another platform must be traced within
    `sapwood.core.target_platform.compiling_for`. An x that is not traced is returned as it is.

    >>> import jax.numpy as jnp
    >>> compute_once(jnp.array([1.0, 2.0]))
    Array([1., 2.], dtype=float32)
    """
    if platform() != "cpu" or not is_traced(x):
        return x
    from jax.experimental.xla_metadata import set_xla_metadata

    with set_xla_metadata(inlineable="false"):
        return _keep(x)


@jax.jit
def _keep(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)  # JAX drops the call of a function that has no operation
