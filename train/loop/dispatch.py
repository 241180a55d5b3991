"""How `fit` sends its steps to the device: one at a time, or in blocks of several. The results have the same bits.

`Sender` has a fixed block size. `Auto` (``steps_per_call="auto"``) begins with single steps and goes through stages.
`_pace` measures single steps. If they are short, and enough of them are left to repay a second compilation, a block is
compiled in a thread, while `_wait` goes on with single steps. The first block is compared with single steps bit for bit
(`_hold`). Then `_race` alternates stretches of single steps and of blocks; each step is a step of the training. Blocks
stay if they are faster by a fiftieth.
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
"""Longest step, in seconds, for which blocks are tried. The cost of sending a longer step is negligible."""
SAVED = 0.25
"""Share of the time of short steps that blocks are expected to save."""
MARGIN = 2.0
"""Blocks are tried if the expected saving is at least this many times the time to compile. Both are estimates."""
WINDOW = 16
"""Single steps in one stretch of the measurement that comes before the race."""
STRETCH = 4
"""Blocks, or as many single steps as these have, in each stretch of the race."""
ROUNDS = 5
"""Stretches that are measured before a decision: of single steps at first, and of each kind in the race."""


class Sender:
    """Sends steps in blocks, or one at a time where a row closes before the end of a block.

    The first block is run both ways. If they differ in a bit, all later steps are sent one at a time.

    Attributes:
        cadence: the cadence of the run.
        programs: the compiled step and block.
        block: number of steps of a block; 1 sends steps one at a time.
        several: the compiled program of a block, or None.
        held: True once a block gave the same bits as single steps.
        key: the run's key and its data on the devices, kept from call to call.
        chosen: how many steps are sent at once, for the config of the run; None is not decided yet.
    """

    def __init__(self, cadence: Cadence, programs: StepPrograms):
        self.cadence, self.programs = cadence, programs
        self.block, self.several = programs.size or 1, programs.block
        self.held = False
        self.key: tuple[Any, Any] | None = None
        self.chosen = programs.size

    def size(self, done: int) -> int:
        """Return how many steps are sent next, after ``done`` steps."""
        return size(self.cadence, self.block, done)

    def send(self, state: TrainState, batch: Any, size: int) -> tuple[TrainState, list[Packed]]:
        """Send one step, or a block of ``size`` steps. The state is donated.

        Returns the next state, and the metrics in one part or several.
        """
        if size > 1 and not self.held:
            return self._hold(state, batch, size)
        state, found = self._call(self.programs.step if size == 1 else self.several, state, batch)
        return state, [found]

    def _call(self, program: Any, state: TrainState, batch: Any) -> tuple[TrainState, Packed]:
        """Call a program, which takes the key's data apart from the state."""
        key = state.rng
        if self.key is None or self.key[0] is not key:
            self.key = key, _data(key, self.programs.key.sharding)
        after, found = program(_with_key(state, None), self.key[1], batch)
        return _with_key(after, key), found

    def before(self, done: int, state: TrainState) -> None:
        """Called before each `send`, after ``done`` steps. `Auto` starts its clock here."""

    def after(self, done: int, state: TrainState) -> None:
        """Called after each `send`, after ``done`` steps. `Auto` stops its clock here, and may change `block`."""

    def interrupt(self) -> None:
        """Called before work other than steps, so that its time is not measured."""

    def _hold(self, state: TrainState, batches: Any, size: int) -> tuple[TrainState, list[Packed]]:
        """Run the block as single steps and as one program, and compare the bits. Returns the single steps' results."""
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
        """Called if a block gave other bits: send single steps from now on, and warn."""
        self.block = self.chosen = 1
        warnings.warn(
            f"steps_per_call={size}: a block does not give the bits of single steps here; they go one at a time",
            stacklevel=2,
        )


def _with_key(state: TrainState, key: Any) -> TrainState:
    """Return ``state.replace(rng=key)``, in a tenth of its time. Each call of a program does this twice."""
    return TrainState(
        state.step, state.params, state.state, state.opt_state, key, state.ema, state.ema_state,
        state.scale, state.ok, stacks=state.stacks,
    )  # fmt: skip


def _data(key: jax.Array, sharding: Any) -> jax.Array:
    """Return the data of a key, under a sharding."""
    data = jax.random.key_data(key)
    return data if sharding is None else jax.device_put(data, sharding)


@functools.cache
def _nth(sharding: Any) -> Callable[[Any, int], Any]:
    """Return a function that takes batch ``i`` out of a block, under the sharding of a batch."""
    return jax.jit(lambda batches, i: jax.tree.map(lambda x: x[i], batches), out_shardings=sharding)


class Auto(Sender):
    """Sends steps one at a time, until blocks are found to have the same bits and to be faster.

    Attributes:
        stage: the method that is called after each stretch: `_pace`, `_wait` or `_race`; None once it is decided.
        compiled: the result of `_compile`, from a thread.
        tried: the block size of the race.
        seconds: seconds per step of the stretches measured so far, by block size.
        begun: the stretch under way: its first step, its end, and the clock at its beginning; None if there is none.
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
        """Begin a stretch if the row has room for one, or if a short row begins: then with what fits into the row."""
        racing = self.stage == self._race
        if self.stage is None or self.begun is not None or (racing and not self.held):
            return
        wanted, left = STRETCH * self.tried if racing else WINDOW, self.cadence.row_end(done) - done
        steps = min(wanted, left // self.block * self.block)
        if steps == wanted or (
            steps and (done == 0 or self.cadence.closes_row(done))
        ):  # a short row: take as much of it as fits
            jax.block_until_ready(state.step)
            self.begun = done, done + steps, time.perf_counter()

    def after(self, done: int, state: TrainState) -> None:
        """End a stretch at its last step, and call `stage` with the median seconds per step of this block size."""
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
        """Send ``block`` steps at once for the rest of the run."""
        self.block, self.chosen, self.stage = block, block, None

    def _pace(self, done: int, seconds: float) -> None:
        """Measure `ROUNDS` stretches of single steps, then begin to compile a block if that may pay.

        Steps that are four times longer than `SHORT` are decided after one stretch.
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
        """Return the best block size and the compiled block; (1, None) if compiling takes longer than it may save."""
        unrolls = self.programs.unrolls
        size = best_size(self.cadence, done, self.programs.largest(unrolls))
        if size == 1 or (unrolls and saving < MARGIN * size * self.programs.seconds):
            return 1, None
        return size, self.programs.compile(size)

    def _wait(self, done: int, seconds: float) -> None:
        """Go on with single steps until the block is compiled, then start the race.

        If compiling failed or would not pay, settle for single steps.
        """
        assert self.compiled is not None
        if not self.compiled.done():
            return
        self.tried, self.several = (1, None) if self.compiled.exception() else self.compiled.result()
        if self.tried == 1:
            return self._settle(1)
        self.seconds, self.stage, self.block = {}, self._race, self.tried

    def _race(self, done: int, seconds: float) -> None:
        """Alternate stretches of single steps and of blocks, and settle for the faster way after `ROUNDS` of each."""
        if all(len(self.seconds.get(size, ())) >= ROUNDS for size in (1, self.tried)):
            one, several = (statistics.median(self.seconds[size]) for size in (1, self.tried))
            return self._settle(self.tried if several < 0.98 * one else 1)
        self.block = self.tried if self.block == 1 else 1
