"""`fit`: the loop around the pure step. It sends steps and never waits for the device without need.

Metrics stay on the device until a row of them closes, are then fetched asynchronously and read one row later; only
callbacks and checkpoints make it wait. Everything that decides what happens next is in the checkpoint, so a run that
was killed and resumed ends bit for bit where an unbroken one does.
"""

import dataclasses
import numbers
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapwood import metrics
from sapwood.core.errors import CheckError, ConfigError
from sapwood.core.platform import platform
from sapwood.core.short_repr import in_brief
from sapwood.data.batching import batches
from sapwood.data.device_feed import to_device
from sapwood.data.learned_features import Learned
from sapwood.runtime.compile_cache import compile_cache as compiled_in
from sapwood.runtime.processes import all_or_none, any_process, from_first_process, max_over_processes
from sapwood.runtime.terminal import say
from sapwood.saving.best_metric import Goal
from sapwood.train.callbacks import Callback, Event
from sapwood.train.callbacks import check as check_callbacks
from sapwood.train.config import Config
from sapwood.train.evaluation import AHEAD, Evaluation, as_dataset, without_flags
from sapwood.train.loop.best_state import Kept, wanted
from sapwood.train.loop.blocks import check_option
from sapwood.train.loop.cadence import Cadence, cadence_of
from sapwood.train.loop.dispatch import Auto, Sender
from sapwood.train.loop.interrupts import Interrupts
from sapwood.train.loop.metric_transfer import Packed, from_text, join, to_text, unpack
from sapwood.train.loop.startup import start
from sapwood.train.optimizers import learning_rate
from sapwood.train.record import run_identity
from sapwood.train.record.progress import Progress
from sapwood.train.record.run_directory import Run
from sapwood.train.state.train_state import TrainState
from sapwood.train.step import checks
from sapwood.train.step.loss_scale import SKIPPED, skips

if TYPE_CHECKING:
    from sapwood.train.trainer import Trainer

ROOM = 4 << 20
"""Characters of the metrics of a row that is under way, in a checkpoint, at most."""


class _Pair(NamedTuple):
    state: TrainState
    history: list[dict[str, Any]]


class Result(_Pair):
    """What `fit` gives: the state after the last step, or the best where that was asked for, and one dict per row.

    ``stopped`` is None, or what ended the run before its last step: "Ctrl-C" or "SIGTERM". What an `EarlyStopping` or
    another callback ends has ended as it should.
    """

    stopped: str | None = None

    __repr__ = in_brief


def fit(
    trainer: "Trainer",
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    validation: Any = None,
    seed: int = 0,
    state: TrainState | None = None,
    run: Any = None,
    resume: bool | str = False,
    checkpoint_every: int | None = None,
    keep: int = 3,
    best: str | None = None,
    log_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    steps_per_call: int | str = "auto",
    compile_cache: Any = None,
    progress: bool = True,
    grace: float | None = 30.0,
    save_nonfinite: bool = False,
) -> Result:
    """Train ``trainer`` on ``data`` (a data set, or anything `sapwood.data.load` takes).

    Args:
        epochs, steps: how long; exactly one of them.
        batch_size: examples of a global batch; the last batch of an epoch is filled from the next one.
        validation: data evaluated at the end of each epoch; its metrics are "validation_loss" and so on. Its classes
            and columns are matched by name with those of ``data`` (`Dataset.held_to`), as in `evaluate` later. A number
            such as 0.2 is the share of ``data`` to hold out, in proportion for each class (`Dataset.split`). It is the
            same one whatever ``seed`` is, so that who goes on from a ``state`` validates on what it has not seen.
        seed: of the first parameters, the order of the data and every random draw.
        state: start from this state instead of a fresh one; it is copied to where the trainer's mesh has it.
        run: directory for ``metrics.jsonl``, TensorBoard events and checkpoints; None writes nothing.
        resume: go on from the newest whole checkpoint in ``run``; from the beginning where there is none. The trainer
            and the data must be those of before, as far as can be seen (`sapwood.train.record.run_identity`); more
            epochs or steps may be asked for. "anyway" goes on whatever has changed, and where a callback had ended the
            run: that one begins afresh, as any does that is another.
        checkpoint_every: steps between checkpoints, and `keep` how many of them stay.
        best: end with the state where a metric was best at the end of an epoch, "max:validation_accuracy" or
            "min:loss", and not with the last one. Its checkpoint is kept in ``run`` beside the newest, from which a
            resume goes on, by the same metric; without ``run`` a copy of it stays on the devices. What reads the run
            takes the best.
        log_every: steps between rows of metrics; each row averages since the one before.
        callbacks: functions ``(event, memory) -> bool | TrainState | None``, see `sapwood.train.callbacks`.
        steps_per_call: steps that go to the device as one program, where no row closes between them. The numbers are
            the same bit for bit whatever it is, or steps go one at a time. "auto" measures whether it pays.
        compile_cache: directory for compiled programs, so that the next start need not compile; True is the user's own,
            see `sapwood.runtime.compile_cache`. None leaves JAX's setting as it is.
        progress: show rows and, in a terminal, a bar.
        grace: seconds that a SIGTERM leaves to end the step and save; then the process ends. None: as long as it takes.
        save_nonfinite: save a checkpoint also where a parameter is NaN or infinite, or anything else in it NaN.

    Ctrl-C ends the run after the step under way, saves a checkpoint in ``run``, and hands back what was trained so far,
    as if the run had been shorter: ``fit(...).stopped`` says so. A second one is a `KeyboardInterrupt` at once. SIGTERM
    saves, too, and then ends the process with exit code 143 (`sapwood.train.loop.interrupts`). Either way ``resume``
    goes on as if nothing had happened, bit for bit.

    Returns the last state (with ``best`` the best one, whose ``step`` says which) and the rows. Raises `ConfigError`
    for options that do not fit together, `DataError` for bad data, `CheckError` where a check fails in a step (nothing
    after that step has changed the state) or a state is not to be saved because it is not finite, `CheckpointError`
    where ``run`` cannot be written, or is being written by another process.

    >>> import numpy as np, optax
    >>> from sapwood.train import Trainer, supervised
    >>> data = {"x": np.eye(4, dtype="float32"), "label": np.arange(4)}
    >>> model = lambda v, x: x @ v.param("w", (4, 4), jax.nn.initializers.zeros)
    >>> trainer = Trainer(supervised(model, inputs="x"), optax.sgd(1.0))
    >>> state, history = fit(trainer, data, epochs=2, batch_size=2, progress=False)
    >>> int(state.step), [row["step"] for row in history], history[-1]["accuracy"]
    (4, [2, 4], 1.0)
    """
    begun = time.time()
    trainer.check_batch_size(batch_size)
    several, asked = _steps_per_call(trainer, steps_per_call), check_callbacks(callbacks)
    interrupts = Interrupts(grace)
    saved = Run.saved(run) if resume else None
    learned = saved and saved.info.get("features")
    known = Learned.from_json(learned) if learned else getattr(state, "features", None)
    data = as_dataset(data, known, "data to train on")
    if isinstance(validation, numbers.Real):
        data, validation = data.split(float(validation))
    features = Learned({**(known or {}), **data.features})
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        trainer = dataclasses.replace(trainer, jit=False)
    stream = batches(data, batch_size, seed=seed)
    goal = wanted(best, asked, saved and saved.best, resume == run_identity.ANYWAY)
    if goal is not None and goal.metric.startswith("validation_") and validation is None:
        asks = f'fit(best="{goal}")' if best is not None else f'the best by "{goal}"'  # of a callback, or of the run
        raise ConfigError(f"{asks} needs fit(validation=...)")
    cadence = cadence_of(
        stream.steps_per_epoch, epochs=epochs, steps=steps, log_every=log_every,
        checkpoint_every=checkpoint_every, best=goal is not None,
    )  # fmt: skip
    programs = trainer.compiled
    evaluation = None if validation is None else Evaluation(trainer, programs, validation, None, "validation", features)
    with compiled_in(compile_cache), Run(run, resume=resume, keep=keep, best=goal and str(goal)) as record:
        record.save_nonfinite = save_nonfinite
        first = start(trainer, programs, stream, evaluation, record, seed=seed, state=state, steps_per_call=several)
        sender = (Auto if first.programs.size is None else Sender)(cadence, first.programs)
        loop = Loop(trainer, sender, first.state, stream, features, cadence, evaluation, record, asked, begun, goal)
        if record.directory is not None:
            held_out = None if evaluation is None else evaluation.data
            loop.identity = all_or_none(lambda: run_identity.identity(trainer, data, held_out, asked))
        loop.restore(first.info, resume)
        show = Progress(cadence.steps, epochs=epochs, start=loop.done, quiet=not progress or jax.process_index() > 0)
        if resume:
            show.say(loop.begins(first.info))
        with show as loop.progress, interrupts:
            loop.run(interrupts)
            record.wait()
        state = loop.state if goal is None else loop.best(first.programs.state)
        if state is not loop.state:
            show.say(f"ends with step {int(jax.device_get(state.step))}, the best by {goal}; the last is {loop.done}")
    result = Result(state.replace(features=features), loop.history)
    if interrupts.asked:
        if jax.process_index() == 0:
            say(f"sapwood: {loop.ended(interrupts.name)}")
        result.stopped = interrupts.name
        interrupts.hand_on()
    return result


def _steps_per_call(config: Config, option: int | str) -> int | None:
    """The steps of a block; None where that is to be found out. Several processes must not find out differently."""
    several = check_option(option)
    if not config.jit or (several == "auto" and jax.process_count() > 1):
        return 1
    return None if isinstance(several, str) else several


@dataclasses.dataclass
class Row:
    """A row that is closed but not read yet: its metrics are on the device, or on their way from there."""

    step: int
    steps: list[Packed]
    validation: list[dict[str, Any]] | None
    rate: float


class Loop:
    """The state of one run of `fit`, and the loop itself."""

    def __init__(
        self, config: Config, sender: Sender, state: TrainState, stream: Any, features: Learned, cadence: Cadence,
        evaluation: Evaluation | None, record: Run, callbacks: tuple[Callback, ...], begun: float,
        goal: Goal | None = None,
    ):  # fmt: skip
        self.config, self.sender, self.state, self.stream, self.cadence = config, sender, state, stream, cadence
        self.evaluation, self.record, self.callbacks, self.features = evaluation, record, callbacks, features
        self.kept = Kept(goal) if goal is not None and record.directory is None else None
        self.asks = any_process(bool(callbacks))  # they may be of the first process alone
        self.progress = Progress(cadence.steps, quiet=True)
        self.history: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = [{} for _ in callbacks]
        self.called = [run_identity.describe_callback(callback) for callback in callbacks]
        self.done, self.stopped, self.begun = 0, False, begun
        self.stopping: list[int] = []  # the places of the callbacks that ended the run
        self.identity: dict[str, Any] = {}
        self.changed: list[str] = []
        self.pending: list[Packed] = []
        self.carried: dict[str, Any] | None = None  # of the row in whose middle the run was stopped and resumed
        self.saved: int | None = None
        self.measured = True  # the last row's metrics are of this model, which no callback has changed since
        self.skipped = 0  # steps in a row, up to the last row that was read
        self.late: deque[Row] = deque()

    def restore(self, info: dict[str, Any] | None, resume: bool | str = True) -> None:
        """Go on where the checkpoint with this info was taken; `ConfigError` where the run would be another."""
        if info is None:
            all_or_none(lambda: self.record.begin(None))
            self.done = int(jax.device_get(self.state.step))
            if self.done >= self.cadence.steps:
                more = self.done + self.cadence.steps
                epochs, rest = divmod(more, self.cadence.steps_per_epoch)
                again = f"steps={more}" if rest else f"epochs={epochs}"
                raise ConfigError(
                    f"fit(state=...): the state is at step {self.done} and the run ends at step {self.cadence.steps}; "
                    f"steps and epochs count from step 0: {again} adds as many again; trainer.restart(state) begins "
                    "anew from what it learned"
                )
            counted = learning_rate.update_count(self.state.opt_state)
            if counted is not None and (counted := int(jax.device_get(counted))) > self.done:
                raise ConfigError(
                    f"fit(state=...): the state is at step {self.done}, but its optimizer's schedule is at update "
                    f"{counted}, where it would go on. trainer.restart(state) gives both from 0, with fresh optimizer "
                    f"memory; state.replace(step={counted}) goes on where the schedule is"
                )
            self.stream.seek(self.done)
            return
        self.stream.restore(info["data"])
        self.done, self.stopped = self.stream.position, info["stopped"] and resume != run_identity.ANYWAY

        def hold() -> list[str]:  # callbacks may be of the first process alone, and it has written
            old = info.get("identity") if jax.process_index() == 0 else None
            return run_identity.require_same(self.record.directory, old, self.identity, resume)

        self.changed = all_or_none(hold)
        if self.done > self.cadence.steps:
            raise ConfigError(
                f"{self.record.directory} is at step {self.done} and is to end at step {self.cadence.steps}; ask for "
                "more epochs or steps"
            )
        self.carried = None if self.changed else info.get("pending") or None
        self.saved = self.done
        self.history = all_or_none(lambda: self.record.begin(self.done))
        self._remember(info, resume)

    def begins(self, info: dict[str, Any] | None) -> str:
        """Where a run that is resumed goes on, in words."""
        run = self.record.directory
        if info is None:
            return f"{run} has no checkpoint: from the beginning"
        at = (
            f"step {self.done} of {self.cadence.steps} (epoch {self.cadence.epoch(self.done)} of {self.cadence.epochs})"
        )
        although = f", although {', '.join(self.changed)}" if self.changed else ""
        over = self.stopped or self.done == self.cadence.steps
        return f"{run} {'is over, at' if over else 'goes on from'} {at}{although}"

    def _remember(self, info: dict[str, Any], resume: bool | str) -> None:
        """Give the callbacks what they knew. It was saved by the first process, which may be the only one with any.

        Under "anyway" another callback begins afresh, and so does what had ended the run: it would end it again.
        """
        memory, now = info["callbacks"], self.called
        before, anyway = info.get("called"), resume == run_identity.ANYWAY  # None in what 0.1 wrote

        def check() -> None:
            if jax.process_index() > 0 or anyway:
                return
            if len(memory) != len(now):
                raise ConfigError(
                    f"the run was saved with {len(memory)} callbacks and is resumed with {len(now)}; give "
                    "the same ones, so that it goes on as if unbroken"
                )
            if before and (other := [i for i, known in enumerate(memory) if known and before[i] != now[i]]):
                was, new = (names[other[0]][""] for names in (before, now))
                raise ConfigError(
                    f"callback {other[0]} was {was}, whose memory was saved, and is now "
                    f"{new if was != new else 'one with other options'}; give the same ones in the same order, so that "
                    "it goes on as if unbroken"
                )

        all_or_none(check)
        if len(memory) != len(now):
            return
        over = info.get("stopping", ()) if anyway and info["stopped"] else ()
        afresh = {i for i in range(len(now)) if anyway and (i in over or (before and before[i] != now[i]))}
        self.memory = [{} if i in afresh else known for i, known in enumerate(memory)]

    def ended(self, by: str | None) -> str:
        """Where a run ended before its last step, and how to go on, in words."""
        run = self.record.directory
        where = f"stopped by {by} after step {self.done} of {self.cadence.steps}"
        if run is None:
            return f"{where}; the state so far is handed back"
        return f"{where}, which is saved in {run}; --resume, or resume=True, goes on from there"

    def run(self, interrupts: Interrupts) -> None:
        """Send every step that is left, or those until something asks for the end."""
        if self.stopped:
            return
        config = self.config
        in_place = config.jit and config.mesh is None and platform() == "cpu"
        feed = to_device(self.stream, config.batch_sharding, block=self.sender.size, host=in_place)
        self.clock, self.clocked = time.perf_counter(), self.done
        alone = jax.process_count() == 1
        try:
            while self.done < self.cadence.steps and not self.stopped:
                self.sender.before(self.done, self.state)
                size, block = self.sender.size(self.done), self.sender.block
                self.state, parts = self.sender.send(self.state, next(feed), size)
                self.done += size
                self.pending += parts if self.carried is None else [self.take_up(parts[0].of), *parts]
                ahead = max(2, AHEAD // size)
                if len(self.pending) > ahead:
                    jax.block_until_ready(self.pending[-ahead])
                self.sender.after(self.done, self.state)
                if self.sender.block != block:
                    feed.seek(self.done)  # what it read ahead is of another size
                self.progress.advance(self.done)
                leaves = interrupts.asked if alone else 0
                if self.cadence.closes_row(self.done):
                    self.close()
                    leaves = max_over_processes(interrupts.asked)  # several processes end at the same step
                if leaves:
                    interrupts.asked = leaves
                    return self.leave()
        finally:
            feed.close()

    def leave(self) -> None:
        """Look at what has been sent, and save it, in the middle of a row: whoever resumes it closes that row."""
        while self.late:
            self.read(self.late.popleft())
        if self.pending:
            self.pending = [join(self.pending)]
            self.look(Row(self.done, self.pending, None, 0.0), unpack(self.pending[0]))
        if self.record.directory is not None and self.saved != self.done:
            self.save({})

    def take_up(self, of: Any) -> Packed:
        """The metrics of a row's steps before the run was stopped, so that the row is that of an unbroken run."""
        carried, self.carried = self.carried or {}, None
        return Packed({kind: from_text(kind, *x) for kind, x in carried.items()}, of)

    def close(self) -> None:
        """Close the row of this step, read what has arrived, and save where a checkpoint is due."""
        self.sender.interrupt()
        validation = None
        if self.evaluation is not None and self.cadence.ends_epoch(self.done):
            validation = self.evaluation.send(self.state)
        now = time.perf_counter()  # steps are sent at the pace of the device, give or take AHEAD of them
        rate = (self.done - self.clocked) / max(now - self.clock, 1e-9)
        self.clock, self.clocked = now, self.done
        self.late.append(Row(self.done, self.pending, validation, rate))
        _start_copies((self.pending, validation))
        self.pending = []
        self.record.note("steps_per_call", self.sender.chosen)
        saves = self.record.directory is not None and self.cadence.saves(self.done)
        at_once = saves or self.asks or self.kept is not None or self.done == self.cadence.steps
        while len(self.late) > (0 if at_once else 1):
            self.read(self.late.popleft())
        if saves or (self.stopped and self.record.directory is not None):
            self.save(self.history[-1] if self.cadence.ends_epoch(self.done) and self.measured else {})

    def save(self, row: dict[str, Any]) -> None:
        """Save all that decides what happens next; `row` holds the metrics of a checkpoint at the end of an epoch."""
        pending = {kind: to_text(x) for kind, x in self.pending[0].vectors.items()} if self.pending else {}
        if sum(len(text) for _, text in pending.values()) > ROOM:
            pending = {}
            say("sapwood: the row of metrics that is under way is too large to be saved: it begins anew after a resume")
        info = {"data": {**self.stream.state(), "position": self.done}, "stopped": self.stopped,
                "callbacks": self.memory, "called": self.called, "pending": pending,
                "stopping": self.stopping, "steps_per_call": self.sender.chosen,
                "features": self.features.to_json(), "identity": self.identity}  # fmt: skip
        self.record.save(self.done, self.state, info, row)
        self.saved = self.done

    def best(self, shapes: TrainState) -> TrainState:
        """The best state of the run; the last one where no epoch's end had a number."""
        if self.kept is not None:
            return self.state if self.kept.state is None else self.kept.state
        return self.record.best(shapes, self.state)

    def read(self, row: Row) -> None:
        """Fetch a row, look at its checks, log it, and ask the callbacks."""
        steps = unpack(join(row.steps))
        self.look(row, steps)
        self.count_skips(row, steps)
        values = metrics.compute(metrics.merge_stacked(without_flags(steps)))
        if row.validation is not None and self.evaluation is not None:
            found = self.evaluation.settle(row.validation, self.state)
            values |= {f"validation_{name}": value for name, value in found.items()}
        line = {"step": row.step, "epoch": self.cadence.epoch(row.step), "loss": values.pop("loss"), **values}
        line["steps_per_second"] = round(row.rate, 2)
        self.history.append(line)
        self.record.write(line)
        self.progress.row(line)
        ends, self.measured = self.cadence.ends_epoch(row.step), True
        if self.kept is not None and ends:
            self.kept.offer(line, self.state)
        for i, (callback, memory) in enumerate(zip(self.callbacks, self.memory, strict=True)):
            state = self.state.replace(features=self.features)
            said = callback(Event(row.step, self.cadence.steps, line["epoch"], ends, line, state, self.begun), memory)
            if isinstance(said, TrainState):  # to go on with
                self.measured &= _same_model(said, self.state)
                self.state = said.replace(features=None)
            else:
                self.stopped = bool(said) or self.stopped
                self.stopping += [i] if said else []
        if self.asks:  # by their own clocks processes would end the run at different steps, and wait for each other
            self.stopped = from_first_process(self.stopped)

    def look(self, row: Row, steps: dict[str, Any]) -> None:
        """Raise where a check failed: the state has not changed since, so that batch can be run again to say why."""
        flags = steps.get(checks.FLAGS, checks.Flags({})).ok
        if all(ok.all() for ok in flags.values()):
            return
        bits = np.stack(list(flags.values()))
        i = int(np.argmin(bits.all(0)))
        failed = [message for message, ok in flags.items() if not ok[i]]
        number = row.step - bits.shape[1] + i
        where = f"in step {number + 1} (epoch {self.cadence.epoch(number + 1)})"
        if jax.process_count() == 1:
            key = jax.random.fold_in(self.state.rng, jnp.int32(number))
            batch = self.config.put(self.stream[number])
            examples, dataset = self.stream.indices(number), self.stream.dataset
            name = lambda row: dataset.where(int(examples[row]))  # noqa: E731
            checks.explain(self.config, self.state, batch, key, train=True, where=where, name=name)
        raise CheckError(f"{'; '.join(failed)}, {where}")

    def count_skips(self, row: Row, steps: dict[str, Any]) -> None:
        """Raise where loss scaling skips step after step: the run would end, and have learned nothing."""
        if SKIPPED not in steps:
            return
        assert self.config.scaling is not None
        self.skipped, most = skips(self.skipped, np.ravel(steps[SKIPPED].steps))
        patience = self.config.scaling.patience
        ends = row.step == self.cadence.steps
        if most >= patience:
            found = f"{patience} steps in a row were skipped by step {row.step} (LossScale(patience={patience}))"
        elif ends and int(jax.device_get(self.state.scale.skipped)) >= row.step:
            found = f"all {row.step} steps of the run were skipped, so nothing was learned"
        else:
            return
        scale = float(jax.device_get(self.state.scale.scale))
        raise CheckError(
            f"{found}: their gradients overflow float16, which ends at 65504, also at a loss scale of {scale:g}; scale "
            "the inputs or the loss down, begin with a smaller LossScale(initial=...), or use bfloat16"
        )


def _same_model(one: TrainState, other: TrainState) -> bool:
    """Whether two states hold the same arrays of parameters and model state."""
    pairs = [jax.tree.leaves((x.params, x.state, x.ema, x.ema_state)) for x in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(a is b for a, b in zip(*pairs, strict=True))


def _start_copies(tree: Any) -> None:
    """Send arrays on their way to the host; on a CPU they are there."""
    if jax.default_backend() != "cpu":
        for x in jax.tree.leaves(tree):
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
