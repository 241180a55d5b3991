"""By which metric something is best, spelled alike in Python and on the command line: "min:loss", "max:accuracy"."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapwood.core.errors import ConfigError


@dataclass(frozen=True)
class Goal:
    """A metric, and which of its values is best: the smallest ("min") or the largest ("max").

    >>> str(Goal("min", "validation_loss")), Goal("max", "accuracy").best({1: 0.5, 2: 0.75, 3: 0.75, 4: float("nan")})
    ('min:validation_loss', 2)
    """

    mode: str
    metric: str

    def __str__(self) -> str:
        return f"{self.mode}:{self.metric}"

    def best(self, values: Mapping[int, float]) -> int | None:
        """The step of the best value, the first of equals; None where there is no number."""
        numbers = {step: x for step, x in values.items() if not math.isnan(x)}
        choose = max if self.mode == "max" else min
        return choose(numbers, key=numbers.__getitem__, default=None)


def goal(best: Any) -> Goal | None:
    """What ``best=`` and ``--best`` say; `ConfigError` for anything but "min:METRIC" and "max:METRIC".

    >>> goal("min:validation_loss")
    Goal(mode='min', metric='validation_loss')
    """
    if best is None:
        return None
    mode, _, metric = best.partition(":") if isinstance(best, str) else ("", "", "")
    if mode not in ("min", "max") or not metric:
        plain = str(best).removeprefix("-") or "loss"
        raise ConfigError(
            f'best={best!r}: "min:{plain}" where the smallest is best, or "max:{plain}" where the largest is'
        )
    return Goal(mode, metric)
