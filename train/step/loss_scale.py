"""Dynamic loss scaling for float16, whose gradients underflow below 6e-8 (Micikevicius et al. 2018, arXiv:1710.03740).

The loss is multiplied by a scale before the gradient is taken. A step whose gradients overflow is skipped and halves
the scale; after a run of good steps it doubles. A row of `fit` counts the skipped steps ("skipped_steps"). At a scale
of 1 nothing is left to halve: gradients that are not finite there fail a check. `fit` ends with an error after
`LossScale.patience` skipped steps in a row, and where it skipped every step. bfloat16 has float32's range and needs
none of this.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.platform import platform
from sapwood.core.short_repr import in_brief
from sapwood.metrics import Metric


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleState:
    """The scale (float32), the good steps since it last changed, and the steps skipped so far (int32); all scalars."""

    scale: Any
    good: Any
    skipped: Any

    __repr__ = in_brief


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How the scale starts and moves: doubled after ``interval`` good steps, halved (down to 1) by an overflow. `fit`
    ends with a `CheckError` where ``patience`` steps in a row overflow; it looks at the end of each row.

    >>> scaling = LossScale(initial=8, interval=2)
    >>> state = scaling.init()
    >>> for finite in (True, True, False):
    ...     state = scaling.update(state, jnp.bool_(finite))
    ...     print(float(state.scale), int(state.skipped))
    8.0 0
    16.0 0
    8.0 1
    """

    initial: float = 2.0**15
    interval: int = 2000
    factor: float = 2.0
    patience: int = 50

    def __post_init__(self) -> None:
        if self.initial < 1 or self.interval < 1 or self.factor <= 1 or self.patience < 1:
            raise ConfigError(
                f"{self}: the initial scale, the interval and the patience are at least 1, the factor more than 1"
            )

    def init(self) -> ScaleState:
        """The state before the first step."""
        return ScaleState(jnp.float32(self.initial), jnp.int32(0), jnp.int32(0))

    def update(self, state: ScaleState, finite: jax.Array) -> ScaleState:
        """The state after a step whose gradients were all finite, or not."""
        grow = finite & (state.good + 1 >= self.interval)
        up, down = state.scale * self.factor, jnp.maximum(state.scale / self.factor, 1.0)
        # A scale that reached infinity could never come back, so it stops where float32 still holds it.
        scale = jnp.where(grow, jnp.minimum(up, 2.0**126), jnp.where(finite, state.scale, down))
        return ScaleState(scale, jnp.where(finite & ~grow, state.good + 1, 0), state.skipped + ~finite)


def unscaled(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """The gradient of a loss from that of its multiple, in the same dtype. float16 does not hold a scale above 65504.

    >>> unscaled(jnp.float16(32768), jnp.float32(2.0**17))
    Array(0.25, dtype=float16)
    """
    wide = np.promote_types(gradient.dtype, np.float32)
    return (gradient.astype(wide) / scale).astype(gradient.dtype)


SKIPPED = "skipped_steps"
"""Where a step's metrics hold its `Skipped`, under loss scaling."""


class Skipped(Metric):
    """How many steps loss scaling skipped, because their gradients overflowed."""

    steps: Any

    def compute(self) -> Any:
        return self.steps


def skips(before: int, steps: np.ndarray) -> tuple[int, int]:
    """How many steps in a row are skipped at the end, and at most, where ``before`` ones came before these.

    >>> skips(2, np.array([1, 0, 1, 1]))
    (2, 3)
    """
    most = now = before
    for skipped in steps.tolist():
        now = now + 1 if skipped else 0
        most = max(most, now)
    return now, most


def all_finite(tree: Any, alone: bool = False) -> jax.Array:
    """Whether every number of a tree is finite: a boolean scalar.

    ``alone`` says that no array is split over devices. On a CPU a matrix is then summed down its columns by a product,
    which takes a fifth of the time of a reduction, next to nothing of a small network's step. (What is not finite stays
    so under the factor, and what is finite does not overflow.)

    >>> bool(all_finite({"a": jnp.ones(2), "b": jnp.array([jnp.inf])}))
    False
    """
    by_product = alone and platform() == "cpu"
    return functools.reduce(operator.and_, (_finite(x, by_product) for x in jax.tree.leaves(tree)))


def _finite(x: jax.Array, by_product: bool) -> jax.Array:
    if by_product and x.ndim > 1 and x.size >= 4096 and jnp.issubdtype(x.dtype, jnp.floating):
        tiny = jnp.full(x.shape[:-1], 2.0**-30, np.promote_types(x.dtype, np.float32))
        x = jnp.tensordot(tiny, x.astype(tiny.dtype), x.ndim - 1)
    return jnp.all(jnp.isfinite(x))
