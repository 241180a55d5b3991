"""How `fit` dispatches training steps: one step per call, or a block of several steps as one compiled program.

Both ways must give the same bits. `Sender` runs the first block as single steps too, and compares the results. If any
bit differs, it keeps the results of the single steps and dispatches no further block.

`Auto` measures which way is faster, for ``steps_per_call="auto"``. It begins with single steps and times them. If they
are short, and enough steps are left to repay a second compilation, a thread compiles a block while training goes on.
Then comes a race: stretches of single steps and stretches of blocks take turns and are timed. They are training steps
like all others, so no work is lost. Blocks win if they take less than 0.98 of the time.
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
"""Seconds that a step may take at most for blocks to be tried. In longer steps the cost of dispatch is negligible."""
SAVED = 0.25
"""Fraction of the time of short steps that blocks are expected to save."""
MARGIN = 2.0
"""A block is compiled only if it should save at least this many times its compile time, since both are estimates."""
WINDOW = 16
"""Steps in each stretch of single steps that is timed before the race."""
STRETCH = 4
"""Blocks in each stretch of blocks in the race. A stretch of single steps in the race has as many steps."""
ROUNDS = 5
"""Stretches of single steps that are timed before a block is compiled, and stretches of each kind in the race."""


class Sender:
    """Dispatches steps: a block if it ends within the current row of metrics, else a single step.

    The first block is run as single steps too. If any bit differs, all later steps are single steps.

    Attributes:
        cadence: the steps at which rows of metrics close.
        programs: the compiled step, and the compiled block if there is one.
        block: steps in a block; 1 means only single steps.
        several: the compiled block; None if there is none yet.
        held: True once a block has had the same bits as single steps.
        key: the run's key and its data on the devices, from the last call; None before the first call.
        chosen: `block`, for the run's config; None while it is not decided.
    """

    def __init__(self, cadence: Cadence, programs: StepPrograms):
        self.cadence, self.programs = cadence, programs
        self.block, self.several = programs.size or 1, programs.block
        self.held = False
        self.key: tuple[Any, Any] | None = None
        self.chosen = programs.size
        """Steps in a block, for the run's config; None while that is not decided."""

    def size(self, done: int) -> int:
        """The number of steps in the next call, when ``done`` steps are done; 0 at the end of the run."""
        return size(self.cadence, self.block, done)

    def send(self, state: TrainState, batch: Any, size: int) -> tuple[TrainState, list[Packed]]:
        """Dispatch one step or one block.

        Args:
            state: the state before; its arrays are donated.
            batch: a batch, or for a block its batches stacked along a first dimension, ``(block, batch, ...)``.
            size: the number of steps: 1 or `block`.

        Returns:
            The state after these steps, and a list of their metrics: one `Packed` for the call, or for the first block
            one `Packed` for each step.
        """
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
        """Called before each call of `send`. `Auto` starts to time a stretch here; this class does nothing."""

    def after(self, done: int, state: TrainState) -> None:
        """Called after each call of `send`. `Auto` may change `block` here; this class does nothing."""

    def interrupt(self) -> None:
        """Called when something other than a step takes time. `Auto` drops the stretch that it times."""

    def _hold(self, state: TrainState, batches: Any, size: int) -> tuple[TrainState, list[Packed]]:
        """Run the block as single steps and as one program, and compare every bit of the results.

        Returns the state and the metrics of the single steps. Sets `held`, or calls `differs`.
        """
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
        """Dispatch only single steps from now on, since a block gave other bits. This class warns; `Auto` does not."""
        self.block = self.chosen = 1
        warnings.warn(
            f"steps_per_call={size}: a block does not give the bits of single steps here; they go one at a time",
            stacklevel=2,
        )


def _with_key(state: TrainState, key: Any) -> TrainState:
    """A copy of the state with this key (None for no key), and without its `features`.

    It runs twice a call. ``state.replace(rng=key)`` takes ten times as long.
    """
    return TrainState(
        state.step, state.params, state.state, state.opt_state, key, state.ema, state.ema_state,
        state.scale, state.ok, stacks=state.stacks,
    )  # fmt: skip


def _data(key: jax.Array, sharding: Any) -> jax.Array:
    data = jax.random.key_data(key)
    return data if sharding is None else jax.device_put(data, sharding)


@functools.cache
def _nth(sharding: Any) -> Callable[[Any, int], Any]:
    """A compiled function ``(batches, i) -> batch``: batch i of a block, with the sharding of a batch."""
    return jax.jit(lambda batches, i: jax.tree.map(lambda x: x[i], batches), out_shardings=sharding)


class Auto(Sender):
    """Dispatches single steps until a block has proved to have the same bits and to be faster.

    Attributes:
        stage: the method to call after each timed stretch, with the steps done and the median seconds per step:
            `_pace`, then `_wait`, then `_race`; None once `block` is final.
        begun: the stretch that is being timed: its first step, its end, and the time at its start; None if there is
            none.
        compiled: the future of `_compile`; None before.
        tried: steps in the block of the race; 1 before the race.
        seconds: seconds per step of each timed stretch, by the block that it used. The race begins with an empty dict.
    """

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
        """Start to time a stretch, if none is being timed and the current row of metrics has room for it.

        If rows are shorter than a stretch, the stretch is a whole row. In the race nothing is timed until the first
        block has been compared with single steps.
        """
        racing = self.stage == self._race
        if self.stage is None or self.begun is not None or (racing and not self.held):
            return
        wanted, left = STRETCH * self.tried if racing else WINDOW, self.cadence.row_end(done) - done
        steps = min(wanted, left // self.block * self.block)
        if steps == wanted or (
            steps and (done == 0 or self.cadence.closes_row(done))
        ):  # at the start of a row: rows are short, and this stretch is a whole row
            jax.block_until_ready(state.step)
            self.begun = done, done + steps, time.perf_counter()

    def after(self, done: int, state: TrainState) -> None:
        """If the timed stretch is over, note its seconds per step and call `stage`."""
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
        """First stage: after `ROUNDS` stretches of single steps, compile a block in a thread if that may pay.

        It cannot pay if steps take longer than `SHORT`, if too few steps are left, or if rows of metrics have no room
        for a block. Then only single steps are used. Very long steps are decided after the first stretch.
        """
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
        """The best number of steps in a block, and the compiled block; ``(1, None)`` if compiling it does not pay.

        On a CPU a block with convolutions is unrolled (`StepPrograms.unrolls`). It then takes about ``size`` times as
        long to compile as a step.
        """
        unrolls = self.programs.unrolls
        size = best_size(self.cadence, done, self.programs.largest(unrolls))
        if size == 1 or (unrolls and saving < MARGIN * size * self.programs.seconds):
            return 1, None
        return size, self.programs.compile(size)

    def _wait(self, done: int, seconds: float) -> None:
        """Second stage: single steps until the block is compiled; then the race, unless there is no block."""
        assert self.compiled is not None
        if not self.compiled.done():
            return
        self.tried, self.several = (1, None) if self.compiled.exception() else self.compiled.result()
        if self.tried == 1:
            return self._settle(1)
        self.seconds, self.stage, self.block = {}, self._race, self.tried

    def _race(self, done: int, seconds: float) -> None:
        """Third stage: stretches of single steps and of blocks take turns. After `ROUNDS` of each, one is kept.

        Blocks are kept if their median time per step is below 0.98 of that of single steps.
        """
        if all(len(self.seconds.get(size, ())) >= ROUNDS for size in (1, self.tried)):
            one, several = (statistics.median(self.seconds[size]) for size in (1, self.tried))
            return self._settle(self.tried if several < 0.98 * one else 1)
        self.block = self.tried if self.block == 1 else 1
