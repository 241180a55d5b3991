"""`Cadence`: the steps at which a run logs, evaluates and saves.

It is arithmetic on step numbers only, so a resumed run does all this at the same steps as an unbroken one. A step
number counts the steps done, from 1.
"""

import dataclasses

from sapwood.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The steps at which a run closes a row of metrics and saves a checkpoint.

    Rows also close at the end of an epoch, at each checkpoint and at the last step. So these checkpoints never lie
    inside a row, and a resume cuts no row.

    Attributes:
        steps: number of steps of the run.
        steps_per_epoch: number of steps of an epoch.
        log_every: steps between rows, counted from the beginning of the epoch.
        checkpoint_every: steps between checkpoints, counted from the beginning of the run.
        every_epoch: True saves a checkpoint at the end of each epoch, too.

    >>> cadence = Cadence(steps=10, steps_per_epoch=5, log_every=3, checkpoint_every=7)
    >>> [s for s in range(1, 11) if cadence.closes_row(s)], [s for s in range(1, 11) if cadence.saves(s)]
    ([3, 5, 7, 8, 10], [7, 10])
    """

    steps: int
    steps_per_epoch: int
    log_every: int
    checkpoint_every: int
    every_epoch: bool = False

    @property
    def epochs(self) -> int:
        """The number of the last epoch."""
        return self.epoch(self.steps)

    def epoch(self, step: int) -> int:
        """Return the number of the epoch, from 1, that step number ``step``, from 1, belongs to."""
        return (step - 1) // self.steps_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        """Return True if a step is the last of its epoch, or of the run."""
        return step % self.steps_per_epoch == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Return True if a checkpoint is saved after a step."""
        return step % self.checkpoint_every == 0 or step == self.steps or (self.every_epoch and self.ends_epoch(step))

    def closes_row(self, step: int) -> bool:
        """Return True if a row of metrics closes after a step."""
        within = step % self.steps_per_epoch
        return within % self.log_every == 0 or self.ends_epoch(step) or self.saves(step)

    def row_end(self, step: int) -> int:
        """Return the last step of the row that the step after ``step`` belongs to.

        >>> Cadence(steps=10, steps_per_epoch=5, log_every=3, checkpoint_every=7).row_end(5)
        7
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        row = epoch * self.steps_per_epoch + min((within // self.log_every + 1) * self.log_every, self.steps_per_epoch)
        return min(row, (step // self.checkpoint_every + 1) * self.checkpoint_every, self.steps)


def cadence_of(
    steps_per_epoch: int,
    *,
    epochs: int | None,
    steps: int | None,
    log_every: int | None,
    checkpoint_every: int | None,
    best: bool,
) -> Cadence:
    """Return the cadence for the options of `fit`.

    Args:
        steps_per_epoch: number of steps of an epoch.
        epochs: number of epochs of the run, or None.
        steps: number of steps of the run, or None.
        log_every: steps between rows. None is one row an epoch, or one every 100 steps if an epoch has more than 200.
        checkpoint_every: steps between checkpoints. None is one an epoch; if epochs are shorter than 200 steps, one
            after as many whole epochs as make 200 steps.
        best: True if the best checkpoint is kept. Then every epoch ends with a checkpoint, which has the metrics of
            that end.

    Raises:
        ConfigError: not exactly one of ``epochs`` and ``steps`` is given, or a number is below 1 or not whole.

    >>> cadence_of(45, epochs=10, steps=None, log_every=None, checkpoint_every=None, best=False)
    Cadence(steps=450, steps_per_epoch=45, log_every=45, checkpoint_every=225, every_epoch=False)
    """
    given = {"epochs": epochs, "steps": steps, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for name, number in given.items():
        if number is not None and (number != int(number) or number < 1):
            raise ConfigError(f"fit({name}={number}): a whole number, at least 1, is expected")
    if (epochs is None) == (steps is None):
        raise ConfigError(f"fit needs either epochs= or steps=, got {'neither' if epochs is None else 'both'}")
    total = steps if steps is not None else (epochs or 1) * steps_per_epoch
    log_every = log_every or (steps_per_epoch if steps_per_epoch <= 200 else 100)
    epochs_a_save = 1 if best else -(-200 // steps_per_epoch)
    return Cadence(total, steps_per_epoch, log_every, checkpoint_every or epochs_a_save * steps_per_epoch, best)
