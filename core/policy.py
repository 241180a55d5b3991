"""`Policy`, the precision of a run: the dtype parameters are stored in and the dtype layers compute in."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError


def floating_dtype(dtype: Any) -> str:
    """The name of a floating dtype. Raises `ConfigError` for anything else.

    >>> floating_dtype("bfloat16"), floating_dtype(jnp.float32)
    ('bfloat16', 'float32')
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError(
            f"a precision must be a floating dtype such as 'float32', 'bfloat16' or 'float16', not {dtype!r}"
        )
    return found.name


@dataclass(frozen=True)
class Policy:
    """The precision of a run: layers compute in dtype ``compute``, parameters are stored in dtype ``param``.

    ``compute=None`` casts nothing, so dtypes follow from the arrays by JAX's promotion. Norm statistics, softmax and
    losses are float32 under every policy. Raises `ConfigError` for a dtype that is not floating.

    >>> Policy("bfloat16")
    Policy(compute='bfloat16', param='float32')
    """

    compute: str | None = None
    param: str = "float32"

    def __post_init__(self) -> None:
        if self.compute is not None:
            object.__setattr__(self, "compute", floating_dtype(self.compute))
        object.__setattr__(self, "param", floating_dtype(self.param))

    def cast(self, tree: Any) -> Any:
        """Cast the floating arrays of a pytree to the compute dtype. All other leaves stay unchanged."""
        if self.compute is None:
            return tree
        return jax.tree.map(self._cast, tree)

    def _cast(self, x: Any) -> Any:
        dtype = getattr(x, "dtype", None)
        floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        return jnp.asarray(x, self.compute) if floating and dtype != self.compute else x


def as_policy(policy: "Policy | str | None") -> Policy:
    """Return a `Policy` unchanged; make one from the name of a compute dtype, or from None, which casts nothing."""
    return policy if isinstance(policy, Policy) else Policy(policy)


def accumulation_dtype(x: jax.Array) -> Any:
    """The dtype that sums of products of ``x`` accumulate in: its dtype promoted with float32."""
    return np.promote_types(x.dtype, np.float32)
