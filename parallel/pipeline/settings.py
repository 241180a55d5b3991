"""Pipeline settings: how a stack of equal blocks is cut into stages, and a batch into micro-batches.

`layers.compose.scan_pipeline` reads them from `Rules.pipeline`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from sapwood.core.errors import ConfigError
from sapwood.core.messages import nearest

Schedule = Literal["gpipe", "interleaved", "1f1b"]


@dataclass(frozen=True)
class Pipeline:
    """How stacks of blocks (`L.Scan`) run if the mesh has the axis "stage". It is the field `Rules.pipeline`.

    Attributes:
        microbatches: the number of micro-batches that a batch is cut into, a multiple of the number of stages. None is
            the largest number that divides the batch, at most four for each stage.
        schedule: "gpipe" (Huang et al. 2019), "interleaved" (Narayanan et al. 2021) or "1f1b" (Narayanan et al. 2019).
        rounds: the number of pieces of the stack on each device, for the schedule "interleaved" only.

    With S stages, M micro-batches and R rounds,

    - "gpipe" idles for (S - 1) / (M + S - 1) of the time. A stage stores the residuals of all micro-batches for the
      gradient; `Scan(remat=)` makes them small.
    - "interleaved" idles for (S - 1) / (R M + S - 1) of the time. Stage s runs the pieces s, S + s, 2 S + s, ... of the
      stack. But a stage stores consecutive pieces, because the order of a parameter's blocks does not depend on the
      mesh. So each step first sends up to (S - 1) / S of the parameters to the stages that use them, and as much of
      their gradients back. It pays if computation takes long compared with that.
    - "1f1b" stores the inputs of at most 2 S - 1 micro-batches, for every M, and the residuals of one. A stack does not
      know the loss, so its backward pass runs the forward pass again at the same time: it takes M + 2 (S - 1) ticks,
      and a quarter more work than "gpipe" with `remat="full"`.

    With every schedule, parameters that "fsdp" stores in shards are gathered for each micro-batch, and the gradient of
    each micro-batch is summed over the shards of the batch. So few large micro-batches send less than many small ones.

    >>> Pipeline(microbatches=8, schedule="interleaved")
    Pipeline(microbatches=8, schedule='interleaved', rounds=2)

    Raises:
        ConfigError: there is no such schedule, or a number is not a whole number above 0.
    """

    microbatches: int | None = None
    schedule: Schedule = "gpipe"
    rounds: int = 2

    def __post_init__(self) -> None:
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
