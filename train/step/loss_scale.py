"""Dynamic loss scaling for float16, whose gradients underflow below 6e-8 (Micikevicius et al. 2018, arXiv:1710.03740).

The loss is multiplied by a scale before the gradient is taken, and the gradient is divided by it. A step whose
gradients overflow is skipped and halves the scale; after `LossScale.interval` good steps the scale doubles. A row of
`fit` counts the skipped steps ("skipped_steps"). A scale of 1 is not halved: non-finite gradients then fail a check.
`fit` raises an error after `LossScale.patience` skipped steps in a row, and if it skipped every step. bfloat16 has the
range of float32 and needs no loss scaling.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.short_repr import in_brief
from sapwood.core.target_platform import platform
from sapwood.metrics import Metric


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleState:
    """The state of loss scaling; all fields are scalars.

    Attributes:
        scale: the factor of the loss, float32.
        good: number of good steps since the scale last changed, int32.
        skipped: number of steps skipped so far, int32.
    """

    scale: Any
    good: Any
    skipped: Any

    __repr__ = in_brief


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How the loss scale starts and changes.

    Attributes:
        initial: the first scale, at least 1.
        interval: number of good steps in a row after which the scale grows.
        factor: the scale is multiplied by this after ``interval`` good steps, and divided by it, down to 1, after an
            overflow. Above 1.
        patience: number of overflows in a row after which `fit` raises a `CheckError`. `fit` counts them at the end of
            each row.

    Raises:
        ConfigError: a field is out of its range.

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
        """Return the state before the first step."""
        return ScaleState(jnp.float32(self.initial), jnp.int32(0), jnp.int32(0))

    def update(self, state: ScaleState, finite: jax.Array) -> ScaleState:
        """Return the state after a step. ``finite`` is a boolean scalar: True if all its gradients were finite."""
        grow = finite & (state.good + 1 >= self.interval)
        up, down = state.scale * self.factor, jnp.maximum(state.scale / self.factor, 1.0)
        # The scale stops at 2**126, which float32 can hold. An infinite scale could never become finite again.
        scale = jnp.where(grow, jnp.minimum(up, 2.0**126), jnp.where(finite, state.scale, down))
        return ScaleState(scale, jnp.where(finite & ~grow, state.good + 1, 0), state.skipped + jnp.int32(~finite))


def unscaled(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """Divide the gradient of a scaled loss by the scale. The result has the dtype of the gradient.

    The division is done in float32 at least, because float16 cannot hold a scale above 65504.

    >>> unscaled(jnp.float16(32768), jnp.float32(2.0**17))
    Array(0.25, dtype=float16)
    """
    wide = np.promote_types(gradient.dtype, np.float32)
    return (gradient.astype(wide) / scale).astype(gradient.dtype)


SKIPPED = "skipped_steps"
"""Name of the `Skipped` in the metrics of a step, under loss scaling."""


class Skipped(Metric):
    """The number of steps that loss scaling skipped because their gradients overflowed."""

    steps: Any

    def compute(self) -> Any:
        return self.steps


def skips(before: int, steps: np.ndarray) -> tuple[int, int]:
    """Count the steps skipped in a row.

    Args:
        before: number of steps skipped in a row directly before these.
        steps: 1 for a skipped step, else 0, ``(steps,)``.

    Returns:
        The number of steps skipped in a row at the end, and the largest such number so far.

    >>> skips(2, np.array([1, 0, 1, 1]))
    (2, 3)
    """
    most = now = before
    for skipped in steps.tolist():
        now = now + 1 if skipped else 0
        most = max(most, now)
    return now, most


def all_finite(tree: Any, alone: bool = False) -> jax.Array:
    """Return a boolean scalar, True if every number of a tree is finite.

    With ``alone``, no array is split over devices. On a CPU a large matrix is then summed down its columns by a matrix
    product, which takes a fifth of the time of a reduction: next to nothing of a small network's step. The factor
    2**-30 in that product keeps finite sums from overflowing, and non-finite numbers stay non-finite.

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
