"""`Goal`: the metric that decides which checkpoint is best, and whether its smallest or its largest value is best.

`fit(best=)` in Python and `--best` on the command line spell it the same way: "min:loss" or "max:accuracy".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapwood.core.errors import ConfigError


@dataclass(frozen=True)
class Goal:
    """A metric, and whether its smallest or its largest value is best.

    Args:
        mode: "min" or "max".
        metric: the name of the metric.

    >>> str(Goal("min", "validation_loss")), Goal("max", "accuracy").best({1: 0.5, 2: 0.75, 3: 0.75, 4: float("nan")})
    ('min:validation_loss', 2)
    """

    mode: str
    metric: str

    def __str__(self) -> str:
        return f"{self.mode}:{self.metric}"

    def best(self, values: Mapping[int, float]) -> int | None:
        """The step with the best of ``values``, which maps steps to numbers.

        Among equal values the first one in ``values`` wins. NaN is ignored. None if no number is left.
        """
        numbers = {step: x for step, x in values.items() if not math.isnan(x)}
        choose = max if self.mode == "max" else min
        return choose(numbers, key=numbers.__getitem__, default=None)


def goal(best: Any) -> Goal | None:
    """Parse the value of ``best=`` or ``--best``. None gives None.

    Raises `ConfigError` for anything other than "min:METRIC" and "max:METRIC".

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
