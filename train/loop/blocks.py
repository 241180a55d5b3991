"""Several training steps in one compiled program: what sending a step costs is paid once for a block of them.

It pays where steps are short. A block has the same bits as its steps sent one at a time, or it is not used: `same_bits`
holds one to the other on the state and the batches that training has reached.
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
"""Steps a block has at most where it is chosen automatically: by then next to nothing of the overhead is left."""
UNROLLED = 16
"""The same where a block is no loop but its steps one after the other, which take as much longer to compile."""
ROOM = 2**24
"""Bytes of the batches of a block that is chosen automatically, at most."""


def train_one(config: Config, state: TrainState, batch: Any) -> tuple[TrainState, Packed]:
    """The state after a batch, and its metrics, packed."""
    after, found = train_step(config, state, batch)
    return after, pack(found)


def train_block(config: Config, state: TrainState, batches: Any) -> tuple[TrainState, Packed]:
    """The state after a block of batches (block, batch, ...), one step each, and the metrics of each, packed."""

    def body(state: TrainState, batch: Any) -> tuple[TrainState, Packed]:  # XLA fuses no step with the one before
        return train_one(config, *lax.optimization_barrier((state, batch)))

    return scan.scan(body, state, batches)


class StepPrograms(NamedTuple):
    """What sends steps: the compiled ``step``, and what a block of them is compiled from.

    ``compiled`` are the programs of the trainer, which keep them for the next run. They take the state without its key,
    the key's data, and a batch or a block: ``state``, ``key`` and ``batch`` are the shapes. ``seconds`` is how long
    the step took to compile; ``block`` is compiled already, of ``size`` steps, unless that is 1 (one at a time) or None
    (not decided yet).
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
        """Whose steps they are."""
        return self.compiled.config

    def compile(self, size: int) -> Callable[..., Any]:
        """The compiled block of so many steps."""
        shapes = self.state.replace(rng=None), self.key, stacked_shapes(self.batch, size)
        return self.compiled.compile(self.several, *shapes)[0]

    @property
    def unrolls(self) -> bool:
        """Whether a block is no loop but its steps one after the other."""
        return scan.unrolls(functools.partial(train_one, self.config), self.state, stacked_shapes(self.batch, 2))

    def largest(self, unrolls: bool) -> int:
        """How many steps a block has at most."""
        batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.batch))
        return max(1, min(UNROLLED if unrolls else LARGEST, ROOM // max(batch, 1)))


def stacked_shapes(batch: Any, size: int) -> Any:
    """The shapes and shardings of a block of batches, from those of a batch."""

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(None, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=sharding)

    return jax.tree.map(stacked, batch)


def check_option(steps_per_call: Any) -> int | str:
    """The option of `fit` as it is; `ConfigError` unless it is "auto" or a whole number, at least 1."""
    if steps_per_call == "auto":
        return steps_per_call
    if not isinstance(steps_per_call, numbers.Integral) or isinstance(steps_per_call, bool) or steps_per_call < 1:
        raise ConfigError(
            f"fit(steps_per_call={steps_per_call!r}): how many steps go to the device at once, a whole number, at "
            f'least 1 (one at a time), is expected, or "auto", which measures'
        )
    return int(steps_per_call)


def size(cadence: Cadence, block: int, step: int) -> int:
    """How many steps go at once after ``step`` are done: the block, or one where a row closes before its end; 0 at the
    end of the run.

    >>> cadence = Cadence(steps=10, steps_per_epoch=10, log_every=5, checkpoint_every=10)
    >>> [size(cadence, 4, step) for step in (0, 1, 4, 5)]
    [4, 4, 1, 4]
    """
    if step >= cadence.steps:
        return 0
    return block if block > 1 and step + block <= cadence.row_end(step) else 1


def best_size(cadence: Cadence, step: int, largest: int) -> int:
    """The block that makes the fewest calls of the rows after ``step``, of up to ``largest`` steps; what does not fill
    a block goes one at a time, so a block that divides the rows is best. 1 where rows have a single step.

    >>> best_size(Cadence(steps=450, steps_per_epoch=45, log_every=45, checkpoint_every=225), 0, 16)
    15
    """
    rows = []
    while step < cadence.steps and len(rows) < 32:
        rows.append(cadence.row_end(step) - step)
        step += rows[-1]
    return min(range(1, largest + 1), key=lambda block: sum(row // block + row % block for row in rows))


def same_bits(one: Any, several: Any) -> bool:
    """Whether two trees of arrays, alike in shapes and shardings, hold the same bits, NaN like any other.

    On the host, because to compile a comparison of so many arrays takes longer than to make it.

    >>> same_bits({"x": jnp.array([0.0])}, {"x": jnp.array([-0.0])})
    False
    """
    same = all(map(_same, jax.tree.leaves(one), jax.tree.leaves(several)))
    return not any_process(not same)  # all processes go the same way


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x).tobytes() == np.asarray(y).tobytes()
    shards = zip(x.addressable_shards, y.addressable_shards, strict=True)
    return all(np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes() for one, other in shards)


def copy(x: Any) -> jax.Array:
    """A copy that may be donated, where the array lies; nothing is compiled for it."""
    return jax.device_put(x, getattr(x, "sharding", None), may_alias=False)
