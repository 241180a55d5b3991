"""How `fit` sends its steps: one at a time, or in blocks of several. Whichever it is, the numbers are the same bits.

With "auto" a run begins one at a time. Where its steps are short and enough of them are left to repay a second
compilation, a block is compiled in a thread meanwhile, held to single steps bit for bit, and then steps go both ways in
turn for a while, as a race whose every step counts; blocks stay where they are faster by a fiftieth.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from sapwood.train.loop.blocks import LARGEST, StepPrograms, best_size, copy, same_bits, size
from sapwood.train.loop.cadence import Cadence
from sapwood.train.loop.metric_transfer import Packed, join
from sapwood.train.state.train_state import TrainState

SHORT = 5e-3
"""Seconds a step may take, at most, for blocks to be tried: in a longer one the cost of sending it is lost."""
SAVED = 0.25
"""The share of the time of short steps that blocks can be hoped to save."""
MARGIN = 2.0
"""What a saving is worth beside the cost of compiling for it, since both are estimates."""
WINDOW = 16
"""Steps over which the pace is taken before anything is decided."""
STRETCH = 4
"""Blocks in each stretch of the race, and `ROUNDS` stretches either way."""
ROUNDS = 5


class Sender:
    """Sends steps in blocks of ``block`` where the schedule lets them run through, else one at a time.

    The first block is run both ways. Where they differ in a bit, every step is sent by itself from then on.
    """

    def __init__(self, cadence: Cadence, programs: StepPrograms):
        self.cadence, self.programs = cadence, programs
        self.block, self.several = programs.size or 1, programs.block
        self.held = False
        self.key: tuple[Any, Any] | None = None
        self.chosen = programs.size
        """How many steps go at once, for the run's config; None while that is not decided."""

    def size(self, done: int) -> int:
        """How many steps go next when ``done`` are."""
        return size(self.cadence, self.block, done)

    def send(self, state: TrainState, batch: Any, size: int) -> tuple[TrainState, list[Packed]]:
        """Send a step, or a block of them; the state is used up. Also returns the metrics, in one part or more."""
        if size > 1 and not self.held:
            return self._hold(state, batch, size)
        state, found = self._call(self.programs.step if size == 1 else self.several, state, batch)
        return state, [found]

    def _call(self, program: Any, state: TrainState, batch: Any) -> tuple[TrainState, Packed]:
        key = state.rng
        if self.key is None or self.key[0] is not key:
            self.key = key, _data(key, self.programs.key.sharding)
        after, found = program(_with_key(state, None), self.key[1], batch)
        return _with_key(after, key), found

    def before(self, done: int, state: TrainState) -> None:
        """Look at the clock before a call."""

    def after(self, done: int, state: TrainState) -> None:
        """Look at the clock after a call, and decide whether `block` is to change."""

    def interrupt(self) -> None:
        """Say that something else than steps takes time now."""

    def _hold(self, state: TrainState, batches: Any, size: int) -> tuple[TrainState, list[Packed]]:
        """Send a block both ways and compare every bit; what comes back is of the steps sent one at a time."""
        nth, other, each = _nth(self.programs.config.batch_sharding), jax.tree.map(copy, state), []
        for i in range(size):
            state, found = self._call(self.programs.step, state, nth(batches, i))
            each.append(found)
        self.held = same_bits((state, join(each)), self._call(self.several, other, batches))
        if not self.held:
            self.differs(size)
        self.interrupt()
        return state, each

    def differs(self, size: int) -> None:
        """What follows where a block has other bits."""
        self.block = self.chosen = 1
        warnings.warn(
            f"steps_per_call={size}: a block does not give the bits of single steps here; they go one at a time",
            stacklevel=2,
        )


def _with_key(state: TrainState, key: Any) -> TrainState:
    """``state.replace(rng=key)``, which takes ten times as long, and this happens twice a call."""
    return TrainState(
        state.step, state.params, state.state, state.opt_state, key, state.ema, state.ema_state,
        state.scale, state.ok, stacks=state.stacks,
    )  # fmt: skip


def _data(key: jax.Array, sharding: Any) -> jax.Array:
    data = jax.random.key_data(key)
    return data if sharding is None else jax.device_put(data, sharding)


@functools.cache
def _nth(sharding: Any) -> Callable[[Any, int], Any]:
    """The batch of a block by its number, sharded as a batch is."""
    return jax.jit(lambda batches, i: jax.tree.map(lambda x: x[i], batches), out_shardings=sharding)


class Auto(Sender):
    """Sends steps one at a time, until blocks are found to have the same bits and to be faster."""

    def __init__(self, cadence: Cadence, programs: StepPrograms):
        super().__init__(cadence, programs)
        self.stage: Callable[[int, float], None] | None = self._pace
        self.compiled: Future | None = None
        self.tried = 1
        self.seconds: dict[int, list[float]] = {}
        self.interrupt()

    def interrupt(self) -> None:
        self.begun: tuple[int, int, float] | None = None

    def before(self, done: int, state: TrainState) -> None:
        """Begin a stretch, where the row has room for one."""
        racing = self.stage == self._race
        if self.stage is None or self.begun is not None or (racing and not self.held):
            return
        wanted, left = STRETCH * self.tried if racing else WINDOW, self.cadence.row_end(done) - done
        steps = min(wanted, left // self.block * self.block)
        if steps == wanted or (
            steps and (done == 0 or self.cadence.closes_row(done))
        ):  # a whole row where rows are short
            jax.block_until_ready(state.step)
            self.begun = done, done + steps, time.perf_counter()

    def after(self, done: int, state: TrainState) -> None:
        """End a stretch that is over."""
        if self.stage is None or self.begun is None or done < self.begun[1]:
            return
        begin, _, clock = self.begun
        jax.block_until_ready(state.step)
        self.seconds.setdefault(self.block, []).append((time.perf_counter() - clock) / (done - begin))
        self.interrupt()
        self.stage(done, statistics.median(self.seconds[self.block]))

    def differs(self, size: int) -> None:
        self._settle(1)

    def _settle(self, block: int) -> None:
        self.block, self.chosen, self.stage = block, block, None

    def _pace(self, done: int, seconds: float) -> None:
        """Take the pace of single steps, and begin to compile a block if that may pay."""
        if len(self.seconds[1]) < ROUNDS and seconds < 4 * SHORT:
            return
        saving = (self.cadence.steps - done) * seconds * SAVED
        if seconds > SHORT or saving < MARGIN * self.programs.seconds or best_size(self.cadence, done, LARGEST) == 1:
            return self._settle(1)
        pool = ThreadPoolExecutor(1, thread_name_prefix="sapwood-block")
        self.compiled = pool.submit(self._compile, done, saving)
        pool.shutdown(wait=False)
        self.stage = self._wait

    def _compile(self, done: int, saving: float) -> tuple[int, Callable[..., Any] | None]:
        """The best size and the compiled block; 1 where that would take longer than it saves."""
        unrolls = self.programs.unrolls
        size = best_size(self.cadence, done, self.programs.largest(unrolls))
        if size == 1 or (unrolls and saving < MARGIN * size * self.programs.seconds):
            return 1, None
        return size, self.programs.compile(size)

    def _wait(self, done: int, seconds: float) -> None:
        """Go on one at a time until the block is compiled."""
        assert self.compiled is not None
        if not self.compiled.done():
            return
        self.tried, self.several = (1, None) if self.compiled.exception() else self.compiled.result()
        if self.tried == 1:
            return self._settle(1)
        self.seconds, self.stage, self.block = {}, self._race, self.tried

    def _race(self, done: int, seconds: float) -> None:
        """Send stretches both ways in turn, and settle for the faster one."""
        if all(len(self.seconds.get(size, ())) >= ROUNDS for size in (1, self.tried)):
            one, several = (statistics.median(self.seconds[size]) for size in (1, self.tried))
            return self._settle(self.tried if several < 0.98 * one else 1)
        self.block = self.tried if self.block == 1 else 1
