"""Several training steps in one compiled program: what sending a step costs is paid once for a block of them.

It pays where steps are short. A block has the same bits as its steps sent one at a time, or it is not used: `same_bits`
holds one to the other on the state and the batches that training has reached.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.errors import ConfigError
from sapwood.core.loop import scan
from sapwood.train.schedule import Schedule
from sapwood.train.state import TrainState
from sapwood.train.step import train_step


def train_block(trainer: Any, state: TrainState, batches: Any) -> tuple[TrainState, dict[str, Any]]:
    """The state after a block of batches (block, batch, ...), one step each, and the metrics of each (block, ...)."""
    return scan(lambda state, batch: train_step(trainer, state, batch), state, batches)


def check_option(steps_per_call: Any) -> int | str:
    """The option of `fit` as it is; `ConfigError` unless it is "auto" or a whole number, at least 1."""
    whole = isinstance(steps_per_call, int) and not isinstance(steps_per_call, bool) and steps_per_call >= 1
    if steps_per_call != "auto" and not whole:
        raise ConfigError(
            f"fit(steps_per_call={steps_per_call!r}): how many steps go to the device at once, a whole number, at "
            f'least 1 (one at a time), is expected, or "auto", which measures'
        )
    return steps_per_call


def size(plan: Schedule, block: int, step: int) -> int:
    """How many steps go at once after ``step`` are done: the block, or one where a row closes before its end; 0 at the
    end of the run.

    >>> plan = Schedule(steps=10, steps_per_epoch=10, log_every=5, checkpoint_every=10)
    >>> [size(plan, 4, step) for step in (0, 1, 4, 5)]
    [4, 4, 1, 4]
    """
    if step >= plan.steps:
        return 0
    return block if step + block <= plan.row_end(step) else 1


class Sender:
    """Sends steps: in blocks of ``block`` where the schedule lets them run through, else one at a time.

    The first block is run both ways, and where they differ in a bit every step is sent by itself from then on.
    """

    def __init__(self, plan: Schedule, step: Callable, several: Callable | None, block: int):
        self.plan, self.step, self.several, self.block = plan, step, several, block
        self.held = False

    def size(self, step: int) -> int:
        """How many steps go next when ``step`` are done."""
        return size(self.plan, self.block, step)

    def send(self, state: TrainState, batch: Any, size: int) -> tuple[TrainState, dict[str, Any]]:
        """Send a step, or a block of them; the state is used up."""
        if size == 1:
            return self.step(state, batch)
        assert self.several is not None
        if self.held:
            return self.several(state, batch)
        return self.hold(state, batch, size)

    def hold(self, state: TrainState, batches: Any, size: int) -> tuple[TrainState, dict[str, Any]]:
        """Send a block both ways and compare every bit; what comes back is of the steps sent one at a time."""
        copy = jax.tree.map(jnp.copy, state)
        each = []
        for i in range(size):
            state, found = self.step(state, jax.tree.map(operator.itemgetter(i), batches))
            each.append(found)
        one = state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        self.held = bool(same_bits(one, self.several(copy, batches)))
        if not self.held:
            self.block = 1
            warnings.warn(
                f"{size} steps in one program do not give the bits of single steps here, so steps go one at a time",
                stacklevel=2,
            )
        return one


@jax.jit
def same_bits(a: Any, b: Any) -> jax.Array:
    """Whether two trees of equal structure hold the same bits everywhere: a boolean scalar, NaN like any other bits.

    >>> bool(same_bits({"x": jnp.array([0.0])}, {"x": jnp.array([-0.0])}))
    False
    """
    equal = [jnp.all(_bits(x) == _bits(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return jnp.all(jnp.stack(equal)) if equal else jnp.bool_(True)


def _bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_bits(x.real), _bits(x.imag)])
    if jnp.issubdtype(x.dtype, jnp.floating):
        return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return x
