"""What several processes do together: they all go on, or all stop, whatever one of them alone has run into.

All of them must call what is here. One process sends nothing.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from sapwood.core.errors import CheckpointError
from sapwood.core.messages import short

SAID = 1024
"""Bytes of what a process tells the others about an attempt."""

_Result = TypeVar("_Result")


def together(attempt: Callable[[], _Result], mild: type[CheckpointError] = CheckpointError) -> _Result:
    """What an attempt returns or raises; on several processes it returns on all of them or raises on all.

    Where another process has run into what is worse than what this one has, that is raised: as `mild` if it was that
    class of error, which is the least of them, else as `CheckpointError`.

    >>> together(lambda: 3)
    3
    """
    try:
        result = attempt()
    except Exception as error:
        _heed(error, mild)
        raise
    _heed(None, mild)
    return result


def _heed(error: Exception | None, mild: type[CheckpointError]) -> None:
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    grade = 0 if error is None else 1 if isinstance(error, mild) else 2
    text = f"process {jax.process_index()}: {'' if error is None else short(error)}".encode()[: SAID - 1]
    said = multihost_utils.process_allgather(np.frombuffer(bytes([grade]) + text.ljust(SAID - 1), np.uint8))
    worst = said[said[:, 0].argmax()]
    if worst[0] > grade:
        kind = mild if worst[0] == 1 else CheckpointError
        raise kind(worst[1:].tobytes().decode(errors="replace").rstrip())


def anyone(says: bool) -> bool:
    """Whether any process says so.

    >>> anyone(False)
    False
    """
    if jax.process_count() == 1:
        return says
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(says))))


def of_the_first(value: bool) -> bool:
    """What the first process says.

    >>> of_the_first(True)
    True
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def by_the_first(attempt: Callable[[], Any]) -> Any:
    """What an attempt of the first process gives, told to all of them as JSON; where it raises, all of them raise.

    >>> by_the_first(lambda: "runs/digits-001")
    'runs/digits-001'
    """
    if jax.process_count() == 1:
        return attempt()
    from jax.experimental import multihost_utils

    said = together(lambda: json.dumps(attempt()).encode() if jax.process_index() == 0 else b"")
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(said.ljust(size), np.uint8))
    return json.loads(np.asarray(text).tobytes())


def largest(number: int) -> int:
    """The largest of the numbers that the processes have, each below 2^31.

    >>> largest(3)
    3
    """
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def union(numbers: list[int]) -> list[int]:
    """The numbers, from 0 on, that any process has, ascending.

    >>> union([2, 5])
    [2, 5]
    """
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    longest = int(multihost_utils.process_allgather(np.uint32(len(numbers))).max())
    if not longest:
        return []
    padded = np.array(numbers + [-1] * (longest - len(numbers)), np.int64)
    seen = multihost_utils.process_allgather(padded.view(np.uint32))  # JAX has no 64-bit integers by default
    return sorted({*np.frombuffer(seen.tobytes(), np.int64).tolist()} - {-1})
