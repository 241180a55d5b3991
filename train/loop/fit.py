"""`fit`: the loop around the pure step, which sends steps to the device and waits for it only if it must.

Metrics stay on the device until a row of them closes. They are then fetched asynchronously and read one row later. The
loop waits for the device if `AHEAD` steps are under way, and for callbacks, checkpoints, a copy of the best state and
the end of the run. A checkpoint holds everything that decides what happens next, so a run that was killed and resumed
gives the same bits as an unbroken one. `Loop` is the run itself: `Loop.run` sends steps, `Loop.close` closes a row,
`Loop.read` reads a closed row, and `Loop.save` writes a checkpoint.
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
from sapwood.core.short_repr import in_brief
from sapwood.core.target_platform import platform
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
"""Most characters that the metrics of an unfinished row may take in a checkpoint."""


class _Pair(NamedTuple):
    state: TrainState
    history: list[dict[str, Any]]


class Result(_Pair):
    """The result of `fit`: a pair ``(state, history)``.

    Attributes:
        state: the state after the last step; with ``best``, the best state.
        history: the rows of metrics, one dict per row.
        stopped: name of the signal that ended the run before its last step, such as "Ctrl-C" or "SIGTERM"; None
            otherwise. It is also None if a callback such as `EarlyStopping` ended the run.
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
    """Train ``trainer`` on ``data``.

    Ctrl-C ends the run after the step under way, saves a checkpoint in ``run``, and returns what was trained so far, as
    if the run had been shorter; ``fit(...).stopped`` says so. A second Ctrl-C raises `KeyboardInterrupt` at once.
    SIGTERM saves, too, and then ends the process with exit code 143 (`sapwood.train.loop.interrupts`). After both,
    ``resume`` continues the run and gives the same bits as an unbroken run.

    Args:
        trainer: the trainer.
        data: a data set, or anything that `sapwood.data.load` takes.
        epochs: length of the run in epochs. Exactly one of ``epochs`` and ``steps`` is given.
        steps: length of the run in steps.
        batch_size: examples of a global batch. The last batch of an epoch is filled from the next epoch.
        validation: data evaluated at the end of each epoch; its metrics are "validation_loss" and so on. Its classes
            and columns are matched by name with those of ``data`` (`Dataset.held_to`), as in `evaluate` later. A number
            such as 0.2 is the share of ``data`` to hold out, in proportion for each class (`Dataset.split`). The share
            does not depend on ``seed``, so a run that continues from a ``state`` validates on examples that it has
            not seen.
        seed: seed of the first parameters, of the order of the data and of every random draw.
        state: the state to start from, which is copied to the shardings of the trainer. None makes a new state.
        run: directory for ``metrics.jsonl``, TensorBoard events and checkpoints; None writes nothing.
        resume: True continues from the newest whole checkpoint in ``run``, or starts from the beginning if there is
            none. Trainer and data must be the same as before, as far as can be detected
            (`sapwood.train.record.run_identity`); more epochs or steps may be asked for. "anyway" accepts every change,
            and continues a run that a callback had ended. That callback, and any that has changed, then starts with
            an empty memory.
        checkpoint_every: steps between checkpoints. None is one an epoch, or every 200 steps or so if epochs are
            shorter (`train.loop.cadence`).
        keep: number of newest checkpoints that stay.
        best: the metric whose best state, of those at the end of an epoch, is returned in place of the last state:
            "max:validation_accuracy" or "min:loss". Its checkpoint stays in ``run`` beside the newest, from which a
            resume continues, with the same metric. Without ``run``, a copy of it stays on the devices. Whatever reads
            the run directory takes the best checkpoint.
        log_every: steps between rows of metrics. Each row is an average over the steps since the row before. None is
            one row an epoch, or one every 100 steps if an epoch has more than 200.
        callbacks: functions ``(event, memory) -> bool | TrainState | None``; see `sapwood.train.callbacks`.
        steps_per_call: steps that are sent to the device as one program, if no row closes between them. The results
            have the same bits for every value; if they would not, steps are sent one at a time. "auto" measures whether
            more than one is faster.
        compile_cache: directory that keeps compiled programs, so that the next start need not compile. True is the
            directory of the user; see `sapwood.runtime.compile_cache`. None leaves JAX's setting unchanged.
        progress: True shows the rows and, in a terminal, a bar.
        grace: seconds that a SIGTERM leaves to end the step and to save; then the process ends. None sets no limit.
        save_nonfinite: True saves a checkpoint even if a parameter is NaN or infinite, or anything else in it is NaN.

    Returns:
        The last state and the rows, as a `Result`. With ``best`` it is the best state, whose ``step`` says which.

    Raises:
        ConfigError: options do not fit together.
        DataError: the data are invalid.
        CheckError: a check fails in a step, and no later step has changed the variables; or a state is not saved
            because it is not finite.
        CheckpointError: ``run`` cannot be written, or another process writes to it.

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
        asks = f'fit(best="{goal}")' if best is not None else f'the best by "{goal}"'  # set by a callback, or the run
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
    """Return the number of steps in a block, or None if it is to be measured.

    On several processes "auto" is 1, because each process could come to another result. Without jit it is always 1.
    """
    several = check_option(option)
    if not config.jit or (several == "auto" and jax.process_count() > 1):
        return 1
    return None if isinstance(several, str) else several


@dataclasses.dataclass
class Row:
    """A row that is closed but not read yet. Its metrics are on the device, or on their way to the host.

    Attributes:
        step: the last step of the row.
        steps: the metrics of its steps, in one part or several.
        validation: the metrics of a validation pass, a dict for each batch, or None.
        rate: steps per second.
    """

    step: int
    steps: list[Packed]
    validation: list[dict[str, Any]] | None
    rate: float


class Loop:
    """One run of `fit`: its state between steps, and the loop.

    Args:
        config: the config.
        sender: sends the steps.
        state: the state to begin from.
        stream: the batches of the training data, `Batches`.
        features: the features of the training data.
        cadence: when rows close and checkpoints are saved.
        evaluation: the evaluation of the validation data, or None.
        record: the run directory.
        callbacks: the callbacks.
        begun: when `fit` began, in seconds as from `time.time`.
        goal: the goal of the best state, or None.

    Attributes:
        history: the rows so far.
        memory: the memory of each callback.
        done: number of steps done.
        stopped: True if a callback has ended the run.
        pending: the metrics of the steps since the last row.
        late: rows that are closed but not read.
    """

    def __init__(
        self, config: Config, sender: Sender, state: TrainState, stream: Any, features: Learned, cadence: Cadence,
        evaluation: Evaluation | None, record: Run, callbacks: tuple[Callback, ...], begun: float,
        goal: Goal | None = None,
    ):  # fmt: skip
        self.config, self.sender, self.state, self.stream, self.cadence = config, sender, state, stream, cadence
        self.evaluation, self.record, self.callbacks, self.features = evaluation, record, callbacks, features
        self.kept = Kept(goal) if goal is not None and record.directory is None else None
        self.asks = any_process(bool(callbacks))  # True if any process has callbacks
        self.progress = Progress(cadence.steps, quiet=True)
        self.history: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = [{} for _ in callbacks]
        self.called = [run_identity.describe_callback(callback) for callback in callbacks]
        self.done, self.stopped, self.begun = 0, False, begun
        self.stopping: list[int] = []  # indices of the callbacks that ended the run
        self.identity: dict[str, Any] = {}
        self.changed: list[str] = []
        self.pending: list[Packed] = []
        self.carried: dict[str, Any] | None = None  # metrics of an unfinished row, from the checkpoint
        self.saved: int | None = None
        self.measured = True  # False if a callback changed the model after the metrics of the last row were measured
        self.skipped = 0  # steps that loss scaling skipped in a row, up to the last row that was read
        self.late: deque[Row] = deque()

    def restore(self, info: dict[str, Any] | None, resume: bool | str = True) -> None:
        """Set the loop to the step of the checkpoint with this info, or of the state if ``info`` is None.

        Raises:
            ConfigError: the resumed run differs from the earlier one; the state is past the end of the run; or the
                schedule of a given state's optimizer is ahead of the state's step.
        """
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

        def hold() -> list[str]:  # the first process wrote the identity; others may lack its callbacks
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
        """Say in words where a resumed run continues."""
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
        """Restore the memory of the callbacks.

        The first process saved it, and may be the only one that has callbacks. With ``resume="anyway"``, a callback
        that has changed starts with an empty memory. So does one that had ended the run, since it would end it again.

        Raises:
            ConfigError: the callbacks have changed, and ``resume`` is not "anyway".
        """
        memory, now = info["callbacks"], self.called
        before, anyway = info.get("called"), resume == run_identity.ANYWAY  # `before` is None in checkpoints of 0.1

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
        """Say in words where a run ended before its last step, and how to continue."""
        run = self.record.directory
        where = f"stopped by {by} after step {self.done} of {self.cadence.steps}"
        if run is None:
            return f"{where}; the state so far is handed back"
        return f"{where}, which is saved in {run}; --resume, or resume=True, goes on from there"

    def run(self, interrupts: Interrupts) -> None:
        """Send all remaining steps, or fewer if a callback or a signal asks for the end."""
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
                    feed.seek(self.done)  # drop batches that were read ahead for the old size
                self.progress.advance(self.done)
                leaves = interrupts.asked if alone else 0
                if self.cadence.closes_row(self.done):
                    self.close()
                    leaves = max_over_processes(interrupts.asked)  # all processes end at the same step
                if leaves:
                    interrupts.asked = leaves
                    return self.leave()
        finally:
            feed.close()

    def leave(self) -> None:
        """End in the middle of a row: check the steps that were sent, and save. The resumed run closes the row."""
        while self.late:
            self.read(self.late.popleft())
        if self.pending:
            self.pending = [join(self.pending)]
            self.look(Row(self.done, self.pending, None, 0.0), unpack(self.pending[0]))
        if self.record.directory is not None and self.saved != self.done:
            self.save({})

    def take_up(self, of: Any) -> Packed:
        """Return the metrics of the steps of a row that came before the run was stopped, from the checkpoint.

        With them the row is the same as in an unbroken run. ``of`` is `Packed.of` of the steps.
        """
        carried, self.carried = self.carried or {}, None
        return Packed({kind: from_text(kind, *x) for kind, x in carried.items()}, of)

    def close(self) -> None:
        """Close the row of this step, read earlier rows, and save if a checkpoint is due."""
        self.sender.interrupt()
        validation = None
        if self.evaluation is not None and self.cadence.ends_epoch(self.done):
            validation = self.evaluation.send(self.state)
        now = time.perf_counter()  # the host is at most AHEAD steps ahead of the device
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
        """Save a checkpoint of everything that decides what happens next.

        ``row`` has the metrics of the state if it is one at the end of an epoch. It is empty otherwise.
        """
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
        """Return the best state of the run, or the last one if no epoch ended with a number for the metric."""
        if self.kept is not None:
            return self.state if self.kept.state is None else self.kept.state
        return self.record.best(shapes, self.state)

    def read(self, row: Row) -> None:
        """Fetch a row, look at its checks, log it, and call the callbacks."""
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
            if isinstance(said, TrainState):  # the run continues with this state
                self.measured &= _same_model(said, self.state)
                self.state = said.replace(features=None)
            else:
                self.stopped = bool(said) or self.stopped
                self.stopping += [i] if said else []
        if self.asks:  # processes whose callbacks end at different steps would wait for each other
            self.stopped = from_first_process(self.stopped)

    def look(self, row: Row, steps: dict[str, Any]) -> None:
        """Raise `CheckError` if a check failed in a row.

        Parameters and model state have not changed since the failed step, so its batch is run again to say why.
        """
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
        """Raise `CheckError` if loss scaling skipped `LossScale.patience` steps in a row, or all steps of the run."""
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
    """Return True if two states hold the same array objects as parameters, model state and running means."""
    pairs = [jax.tree.leaves((x.params, x.state, x.ema, x.ema_state)) for x in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(a is b for a, b in zip(*pairs, strict=True))


def _start_copies(tree: Any) -> None:
    """Begin to copy arrays to the host, without waiting. On a CPU they are there already."""
    if jax.default_backend() != "cpu":
        for x in jax.tree.leaves(tree):
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
