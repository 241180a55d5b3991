"""`aligned`: a parameter in as many dimensions as what it is added to, as `jax_numpy_rank_promotion` may want it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def aligned(a: Any, x: Any) -> jax.Array:
    """`a` with leading dimensions of 1, as many as x has more: what `a + x` does by itself, unless JAX is told not to.

    >>> aligned(jnp.ones(3), jnp.ones((5, 4, 3))).shape
    (1, 1, 3)
    """
    return lax.expand_dims(a, range(jnp.ndim(x) - jnp.ndim(a)))
