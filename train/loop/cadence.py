"""When a run logs, evaluates and saves: arithmetic on step numbers, so a resumed run does it at the same steps."""

import dataclasses

from sapwood.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Cadence:
    """``steps`` in all, ``steps_per_epoch``; a row every ``log_every`` steps of an epoch, a checkpoint every
    ``checkpoint_every`` steps, and at the end of each epoch with ``every_epoch``. Rows also close at the end of an
    epoch, at each checkpoint and at the last step, so no row is ever cut by a resume.

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
        """The epoch in which the run ends."""
        return self.epoch(self.steps)

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that a step belongs to; ``step`` counts the steps done, from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last of its epoch, or of the run."""
        return step % self.steps_per_epoch == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        return step % self.checkpoint_every == 0 or step == self.steps or (self.every_epoch and self.ends_epoch(step))

    def closes_row(self, step: int) -> bool:
        """Whether a row of metrics is due after a step."""
        within = step % self.steps_per_epoch
        return within % self.log_every == 0 or self.ends_epoch(step) or self.saves(step)

    def row_end(self, step: int) -> int:
        """The number of steps done when the row closes that the step after ``step`` belongs to.

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
    """The cadence from the options of `fit`.

    A row an epoch, and every 100 steps where epochs are longer than 200. A checkpoint an epoch; where epochs are
    shorter than 200 steps, only as often as makes 200. To keep the best one, each epoch has one, whose metrics are
    those of its end. Raises `ConfigError` unless exactly
    one of ``epochs`` and ``steps`` is given, and for numbers below 1.

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
