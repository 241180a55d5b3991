"""Agreement between several processes: if one of them fails, all of them stop; otherwise all of them go on.

All processes must call each function here, in the same order. With one process, nothing is sent.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from sapwood.core.errors import CheckpointError
from sapwood.core.messages import short

SAID = 1024
"""Bytes of the message that a process sends to the others about an attempt."""

_Result = TypeVar("_Result")


def all_or_none(attempt: Callable[[], _Result], mild: type[CheckpointError] = CheckpointError) -> _Result:
    """Call `attempt` on every process. Either it returns on all of them, or all of them raise.

    If another process met a more severe error than this one, that error is raised here too: as `mild` if it is of that
    class (the least severe one), else as `CheckpointError`. Success is less severe than any error.

    >>> all_or_none(lambda: 3)
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
    """Tell all processes about this one's error, and raise the worst error of another if it is worse than this one."""
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


def any_process(says: bool) -> bool:
    """True if `says` is True on any process.

    >>> any_process(False)
    False
    """
    if jax.process_count() == 1:
        return says
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(says))))


def from_first_process(value: bool) -> bool:
    """The value on the first process.

    >>> from_first_process(True)
    True
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def run_on_first_process(attempt: Callable[[], Any]) -> Any:
    """Call `attempt` on the first process only, and return its result, sent as JSON, on all of them.

    If it raises, all processes raise (see `all_or_none`).

    >>> run_on_first_process(lambda: "runs/digits-001")
    'runs/digits-001'
    """
    if jax.process_count() == 1:
        return attempt()
    from jax.experimental import multihost_utils

    said = all_or_none(lambda: json.dumps(attempt()).encode() if jax.process_index() == 0 else b"")
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(said.ljust(size), np.uint8))
    return json.loads(np.asarray(text).tobytes())


def max_over_processes(number: int) -> int:
    """The largest of the processes' numbers, each below 2^31.

    >>> max_over_processes(3)
    3
    """
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def union(numbers: list[int]) -> list[int]:
    """All numbers that any process has, in ascending order. They must not be negative.

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
    # JAX has no 64-bit integers by default, so each number is sent as two of 32 bits.
    seen = multihost_utils.process_allgather(padded.view(np.uint32))
    return sorted({*np.frombuffer(seen.tobytes(), np.int64).tolist()} - {-1})
