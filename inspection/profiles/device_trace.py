"""Read a trace of `jax.profiler`, and divide its wall time among the operations.

Operations overlap: a CPU runs several threads, an accelerator several streams. Each moment is shared equally among the
operations that run in it, so the parts of a profile add up to wall time. Times in a trace are in nanoseconds;
`divide_time` gives seconds.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

STEPS, FEED = "sapwood.steps", "sapwood.feed"  # annotations of the traced loop: all steps, and waiting for data

BETWEEN = "(between operations)"
HOST = "(waiting for the host)"
DATA = "(waiting for data)"
OTHER = "(other programs)"


class Span(NamedTuple):
    """One execution of an operation.

    `start` and `end` are in nanoseconds. `name` is None for an operation of another program. `run` identifies the run
    of the program, or is None if the trace does not say.
    """

    start: float
    end: float
    name: str | None
    run: Any = None


class Trace(NamedTuple):
    """The operations by device, the start and end of all steps, and the intervals of waiting for data, in
    nanoseconds."""

    devices: dict[Any, list[Span]]
    window: tuple[float, float]
    waits: list[tuple[float, float]]


def read(file: Path, module: str) -> Trace:
    """Read an ``.xplane.pb`` file.

    ``module`` is the HLO module name of the training step. Operations of other programs get no name.
    """
    from jax.profiler import ProfileData

    devices: dict[Any, list[Span]] = {}
    ends: dict[Any, float] = {}
    open_: list[tuple[Any, Span, Any]] = []
    window, waits = (0.0, 0.0), []
    for plane in ProfileData.from_file(str(file)).planes:
        accelerator = plane.name.startswith("/device:")
        for line in plane.lines:
            for event in line.events:
                name, start, end = event.name, event.start_ns, event.start_ns + event.duration_ns
                if name == STEPS:
                    window = start, end
                elif name == FEED:
                    waits.append((start, end))
                elif accelerator and line.name in _SUMMARIES:
                    continue
                else:
                    stats = dict(event.stats) if accelerator or name not in _HOST_NOISE else {}
                    if name.startswith("end: "):
                        ends[stats.get("_c")] = end
                    elif "hlo_op" in stats or (accelerator and line.name == "XLA Ops"):
                        own = stats.get("hlo_module", module) == module
                        op = stats.get("hlo_op") or name.partition(" = ")[0].lstrip("%")
                        span = Span(start, end, op if own else None, stats.get("run_id"))
                        open_.append(
                            (plane.name if accelerator else stats.get("device_ordinal"), span, stats.get("_p"))
                        )
    for device, span, producer in open_:  # an operation that continues in other threads ends at its "end:" event
        devices.setdefault(device, []).append(span._replace(end=max(span.end, ends.get(producer, 0.0))))
    return Trace(devices, window, waits)


_SUMMARIES = ("Steps", "XLA Modules", "Framework Ops", "Framework Name Scope", "Source code", "XLA TraceMe")
_HOST_NOISE = frozenset(("ThreadpoolListener::Record", "ThunkExecutor::Execute"))


class Shares(NamedTuple):
    """The time of the steps on one device, in seconds.

    Attributes:
        seconds: the time of each operation, by name.
        rest: the other time, by kind: the idle times `BETWEEN`, `HOST` and `DATA`, and the time of other programs,
            `OTHER`.
        threads: the sum of the durations of all operations except loops and branches. Moments in which several
            operations run count once for each of them.
    """

    seconds: dict[str, float]
    rest: dict[str, float]
    threads: float


def divide_time(spans: list[Span], trace: Trace, container: Callable[[str], bool]) -> Shares:
    """Divide the time of the steps among the operations of one device.

    All entries of `seconds` and `rest` in the result together add up to the time of the steps.

    A loop or a branch (``container(name)`` is True) counts only while no operation inside it runs. While nothing runs,
    the time is `BETWEEN` within a run of the program. Outside runs it is `DATA` while the host waits for data, else
    `HOST`.

    >>> spans = [Span(0, 4e9, "a"), Span(2e9, 4e9, "b"), Span(0, 6e9, "while")]
    >>> divide_time(spans, Trace({}, (0, 10e9), [(7e9, 10e9)]), "while".__eq__)[:2]
    ({'a': 3.0, 'b': 1.0, 'while': 2.0}, {'(waiting for data)': 3.0, '(waiting for the host)': 1.0})
    """
    first, last = trace.window
    spans = [s._replace(start=max(s.start, first), end=min(s.end, last)) for s in spans]
    spans = [s for s in spans if s.end > s.start]  # drop spans outside the steps, and spans of length 0
    events = sorted(event for k, s in enumerate(spans) for event in ((s.start, 1, k), (s.end, 0, k)))
    loop = [s.name is not None and container(s.name) for s in spans]
    runs = _runs(spans)
    seconds: dict[str, float] = defaultdict(float)
    rest: dict[str, float] = defaultdict(float)
    working: set[int] = set()
    loops: set[int] = set()
    now = first
    for at, begins, k in [*events, (last, 0, -1)]:
        if at > now:
            active = working or loops
            for one in active:
                seconds[spans[one].name or OTHER] += (at - now) / len(active) / 1e9
            if not active:
                for name, part in _idle(now, at, runs, trace.waits):
                    rest[name] += part / 1e9
        now = at
        group = loops if k >= 0 and loop[k] else working
        group.add(k) if begins else group.discard(k)
    if OTHER in seconds:
        rest[OTHER] = seconds.pop(OTHER)
    threads = sum(s.end - s.start for s, is_loop in zip(spans, loop, strict=True) if not is_loop)
    return Shares(dict(seconds), dict(rest), threads / 1e9)


def _runs(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Start and end of each run of the program, in order. Empty if the trace does not name runs."""
    runs: dict[Any, tuple[float, float]] = {}
    for span in spans:
        if span.run is not None and span.name is not None:
            first, last = runs.get(span.run, (span.start, span.end))
            runs[span.run] = min(first, span.start), max(last, span.end)
    return sorted(runs.values())


def _idle(start: float, end: float, runs: list, waits: list) -> Iterable[tuple[str, float]]:
    """The kinds of idle time in an interval in which nothing ran, and how long each took, in nanoseconds."""
    if any(first <= start and end <= last for first, last in runs):
        return [(BETWEEN, end - start)]
    waiting = sum(max(0.0, min(end, b) - max(start, a)) for a, b in waits)
    return [(name, part) for name, part in ((DATA, waiting), (HOST, end - start - waiting)) if part > 0]
