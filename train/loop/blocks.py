"""Blocks: several training steps in one compiled program, so that the cost of a call is paid once for all of them.

This pays if steps are short. A block is used only if it gives the same bits as its steps sent one at a time.
`same_bits` compares the two on the state and the batches that training has reached. `dispatch` decides when steps are
sent in blocks.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sapwood.core import scan
from sapwood.core.errors import ConfigError
from sapwood.runtime.processes import any_process
from sapwood.train.config import Config
from sapwood.train.loop.cadence import Cadence
from sapwood.train.loop.metric_transfer import Packed, pack
from sapwood.train.state.train_state import TrainState
from sapwood.train.step.step import train_step

LARGEST = 64
"""Most steps in a block whose size is chosen automatically. Larger blocks would save next to nothing more."""
UNROLLED = 16
"""The same for an unrolled block. Its program holds every step, so n steps take n times as long to compile."""
ROOM = 2**24
"""Most bytes of the batches in a block whose size is chosen automatically."""


def train_one(config: Config, state: TrainState, batch: Any) -> tuple[TrainState, Packed]:
    """Do one training step. Returns the next state, and the metrics as `Packed`."""
    after, found = train_step(config, state, batch)
    return after, pack(found)


def train_block(config: Config, state: TrainState, batches: Any) -> tuple[TrainState, Packed]:
    """Do one training step for each of the ``batches``, whose arrays are ``(block, batch, ...)``.

    Returns the state after the last step, and the metrics of all steps as `Packed` with a leading axis ``(block,)``.
    """

    def body(state: TrainState, batch: Any) -> tuple[TrainState, Packed]:  # the barrier keeps XLA from fusing steps
        return train_one(config, *lax.optimization_barrier((state, batch)))

    return scan.scan(body, state, batches)


class StepPrograms(NamedTuple):
    """The compiled step, and everything that is needed to compile a block of steps.

    A program takes the state without its key, the key's data, and a batch or a block of batches. It returns the next
    state without its key, and `Packed` metrics.

    Attributes:
        compiled: the `Programs` of the trainer, which keep what is compiled for the next run.
        step: the compiled program of one step.
        seconds: how many seconds compiling the step took.
        several: the function of a block of any size, not compiled yet.
        state: the state as shapes.
        key: the shape of the key's data.
        batch: one batch as shapes.
        size: number of steps in a block; 1 sends steps one at a time; None is not decided yet.
        block: the compiled program of a block of ``size`` steps; None if ``size`` is 1 or None.
    """

    compiled: Any
    step: Callable[..., Any]
    seconds: float
    several: Any
    state: TrainState
    key: Any
    batch: Any
    size: int | None = None
    block: Callable[..., Any] | None = None

    @property
    def config(self) -> Config:
        """The config whose steps these are."""
        return self.compiled.config

    def compile(self, size: int) -> Callable[..., Any]:
        """Return the compiled program of a block of ``size`` steps."""
        shapes = self.state.replace(rng=None), self.key, stacked_shapes(self.batch, size)
        return self.compiled.compile(self.several, *shapes)[0]

    @property
    def unrolls(self) -> bool:
        """True if `core.scan` unrolls a block, as it does on CPU for a model with convolutions."""
        return scan.unrolls(functools.partial(train_one, self.config), self.state, stacked_shapes(self.batch, 2))

    def largest(self, unrolls: bool) -> int:
        """Return the most steps that a block may have, by `LARGEST` or `UNROLLED`, and by `ROOM`."""
        batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.batch))
        return max(1, min(UNROLLED if unrolls else LARGEST, ROOM // max(batch, 1)))


def stacked_shapes(batch: Any, size: int) -> Any:
    """Return the shapes and shardings of a block ``(size, batch, ...)``, from those of one batch."""

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(None, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=sharding)

    return jax.tree.map(stacked, batch)


def check_option(steps_per_call: Any) -> int | str:
    """Return the option of `fit`. Raises `ConfigError` if it is neither "auto" nor an integer of at least 1."""
    if steps_per_call == "auto":
        return steps_per_call
    if not isinstance(steps_per_call, numbers.Integral) or isinstance(steps_per_call, bool) or steps_per_call < 1:
        raise ConfigError(
            f"fit(steps_per_call={steps_per_call!r}): how many steps go to the device at once, a whole number, at "
            f'least 1 (one at a time), is expected, or "auto", which measures'
        )
    return int(steps_per_call)


def size(cadence: Cadence, block: int, step: int) -> int:
    """Return how many steps are sent next, after ``step`` steps are done.

    This is ``block``, or 1 if a row closes before the end of the block, or 0 at the end of the run.

    >>> cadence = Cadence(steps=10, steps_per_epoch=10, log_every=5, checkpoint_every=10)
    >>> [size(cadence, 4, step) for step in (0, 1, 4, 5)]
    [4, 4, 1, 4]
    """
    if step >= cadence.steps:
        return 0
    return block if block > 1 and step + block <= cadence.row_end(step) else 1


def best_size(cadence: Cadence, step: int, largest: int) -> int:
    """Return the block size, at most ``largest``, with which the rows after ``step`` need the fewest calls.

    Steps of a row that do not fill a block are sent one at a time, so a size that divides the rows is best. The result
    is 1 if rows have a single step. At most the next 32 rows are counted.

    >>> best_size(Cadence(steps=450, steps_per_epoch=45, log_every=45, checkpoint_every=225), 0, 16)
    15
    """
    rows = []
    while step < cadence.steps and len(rows) < 32:
        rows.append(cadence.row_end(step) - step)
        step += rows[-1]
    return min(range(1, largest + 1), key=lambda block: sum(row // block + row % block for row in rows))


def same_bits(one: Any, several: Any) -> bool:
    """Return True if two trees of arrays hold the same bits. NaN is compared by its bits, too.

    Both trees have the same shapes and shardings. The comparison is done on the host, because compiling one for so many
    arrays takes longer. If the bits differ on any process, the result is False on all.

    >>> same_bits({"x": jnp.array([0.0])}, {"x": jnp.array([-0.0])})
    False
    """
    same = all(map(_same, jax.tree.leaves(one), jax.tree.leaves(several)))
    return not any_process(not same)  # all processes get the same answer


def _same(x: Any, y: Any) -> bool:
    """Return True if this process's shards of two arrays hold the same bits."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x).tobytes() == np.asarray(y).tobytes()
    shards = zip(x.addressable_shards, y.addressable_shards, strict=True)
    return all(np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes() for one, other in shards)


def copy(x: Any) -> jax.Array:
    """Copy an array under its own sharding, so that the copy can be donated. Nothing is compiled for it."""
    return jax.device_put(x, getattr(x, "sharding", None), may_alias=False)
