"""`expand_rank`: gives a parameter the rank of the array it is added to, by leading dimensions of size 1.

Broadcasting does this by itself. With `jax_numpy_rank_promotion` set to "raise" or "warn", JAX objects to it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def expand_rank(a: Any, x: Any) -> jax.Array:
    """Add leading dimensions of size 1 to `a`, so that it has the rank of x.

    `a + x` does the same by itself, unless `jax_numpy_rank_promotion` forbids it.

    >>> expand_rank(jnp.ones(3), jnp.ones((5, 4, 3))).shape
    (1, 1, 3)
    """
    return lax.expand_dims(a, range(jnp.ndim(x) - jnp.ndim(a)))
