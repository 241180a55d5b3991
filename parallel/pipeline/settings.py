"""Pipelines: a stack of equal blocks cut into stages, through which micro-batches flow."""

from dataclasses import dataclass
from typing import Literal, get_args

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest

Schedule = Literal["gpipe", "interleaved", "1f1b"]


@dataclass(frozen=True)
class Pipeline:
    """How the stacks of blocks (`L.Scan`) run where a mesh has the axis "stage": `Rules.pipeline`.

    Attributes:
        microbatches: how many parts a batch is cut into, which follow one another: a multiple of the stages. None is
            the most that divide the batch, four for each stage at most.
        schedule: "gpipe" (Huang et al. 2019), "interleaved" (Narayanan et al. 2021) or "1f1b" (Narayanan et al. 2019).
        rounds: pieces of the stack on each device where the schedule is "interleaved".

    With S stages and M micro-batches,

    - "gpipe" idles for (S - 1) / (M + S - 1) of the time. A stage keeps what the gradient needs of all micro-batches:
      `Scan(remat=)` makes that little.
    - "interleaved" idles for (S - 1) / (R M + S - 1), in R rounds: stage s has pieces s, S + s, 2 S + s, ... of the
      stack. But a stage stores pieces that follow one another (a tree of parameters is in order, whatever the mesh),
      so each step first sends most of its parameters, up to (S - 1) / S, to the stages that use them, and as much of
      their gradients back. It pays where work is long beside that.
    - "1f1b" keeps the inputs of 2 S - 1 micro-batches at most, whatever M is, and what the gradient needs of one. As a
      stack does not know the loss, its backward pass runs forward again beside: it takes M + 2 (S - 1) ticks, and a
      quarter more work than "gpipe" with `remat="full"`.

    Whatever the schedule, what "fsdp" stores in pieces is gathered for each micro-batch, and the gradient of each is
    summed over the shards of the batch: few large micro-batches send less than many small ones.

    >>> Pipeline(microbatches=8, schedule="interleaved")
    Pipeline(microbatches=8, schedule='interleaved', rounds=2)

    Raises `ConfigError` for a schedule that is none, and for numbers below 1.
    """

    microbatches: int | None = None
    schedule: Schedule = "gpipe"
    rounds: int = 2

    def __post_init__(self):
        if self.schedule not in get_args(Schedule):
            known = get_args(Schedule)
            near = nearest(self.schedule, known) if isinstance(self.schedule, str) else ""
            raise ConfigError(
                f"Pipeline(schedule={self.schedule!r}): no such schedule{near}; there are {', '.join(known)}"
            )
        if self.microbatches is not None:
            _whole("microbatches", self.microbatches)
        _whole("rounds", self.rounds)


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"Pipeline({name}={value!r}): a whole number, at least 1, is expected")
