"""`profile`: the time of a training step by layer path.

`profile` compiles the trainer's step, runs it without and then with `jax.profiler`, reads the trace (`trace`) and
attributes each operation to a layer (`attribution`). `_profile` averages the devices; `_rows` adds up the paths.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as File
from typing import Any

import jax
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.core.layer import describe
from sapwood.core.paths import Path
from sapwood.data.batching import batches
from sapwood.data.device_feed import to_device
from sapwood.inspection.layer_calls import trace_calls
from sapwood.inspection.profiles import device_trace
from sapwood.inspection.profiles.attribution import BACKWARD, FORWARD, UNKNOWN, Place, Program
from sapwood.train.evaluation import AHEAD, as_dataset
from sapwood.train.state import plan as state_plan
from sapwood.train.trainer import Trainer

WARM = 3
"""The number of steps before any is timed. The first steps are slower: they touch their memory for the first time."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The time that a step spends at a layer path, in seconds.

    Attributes:
        path: the layer path. One name in parentheses stands for something else than a layer: the optimizer, the time
            between operations, waiting for data.
        seconds: the time at and below the path.
        own: the time at the path without the paths below it.
        forward: the part of ``seconds`` in the forward pass.
        backward: the part of ``seconds`` in the backward pass.
        kinds: ``seconds`` by kind of operation, the slowest kind first.
    """

    path: Path
    seconds: float
    own: float
    forward: float
    backward: float
    kinds: dict[str, float]

    @property
    def layer(self) -> bool:
        """True if the path is that of a layer."""
        return not self.path[0].startswith("(")


@dataclasses.dataclass(frozen=True)
class Profile:
    """The time of a training step by layer path; made by `profile`. It prints as a table; a notebook shows a page.

    Attributes:
        rows: one `Row` for each layer path. Rows below a path follow it, the slowest first.
        seconds: wall time of a traced step in seconds; the sum of the rows whose paths have one name.
        untraced: wall time of a step with the profiler off, in seconds.
        steps: how many steps were traced.
        device: the platform and the kind of the devices.
        devices: how many devices there are; the rows are their mean.
        shared: the share (0 to 1) of the time in fused operations that do work of several rows. The time of such an
            operation is attributed to one row.
        concurrency: how many operations ran at once on a device, on average over the time when any ran.
        trace: the directory of the raw trace.
    """

    rows: tuple[Row, ...]
    seconds: float
    untraced: float
    steps: int
    device: str
    devices: int
    shared: float
    concurrency: float
    trace: str

    @property
    def unattributed(self) -> float:
        """The share (0 to 1) of the time in operations whose metadata names no part of the program."""
        return sum(row.seconds for row in self.rows if row.path == (UNKNOWN,)) / self.seconds

    def row(self, path: str) -> Row:
        """The row of a path such as "blocks/0/conv" or "(optimizer)". Raises `KeyError` if there is none."""
        for row in self.rows:
            if "/".join(row.path) == path:
                return row
        raise KeyError(f"{path!r}; the rows are {', '.join('/'.join(row.path) for row in self.rows)}")

    def table(self, levels: int | None = None) -> str:
        """The rows as text, in lines of at most 100 characters.

        Only rows whose paths have at most ``levels`` names are shown; None shows all. Raises `ConfigError` for levels
        below 1.
        """
        from sapwood.inspection.profiles.table import table

        return table(self, levels)

    def html(self) -> str:
        """One HTML page with the flame chart and the table; it loads no other files."""
        from sapwood.inspection.profiles.html_page import html

        return html(self)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        from sapwood.inspection.profiles.html_page import frame

        return frame(self)


def profile(
    trainer: Trainer, data: Any, *, steps: int = 20, batch_size: int | None = None, seed: int = 0, out: Any = None
) -> Profile:
    """Run training steps under `jax.profiler` and attribute their time to layers.

    Times are wall time. A moment in which several operations run at once is shared among them, so the rows add up to
    the time of a step. Only layers called as layers (`Layer`, `sapwood.layer`) have rows.

    Args:
        trainer: a `Trainer` with ``jit=True``. A new training state is made for the profile and then discarded.
        data: a dict of arrays, used as the batch of every step; or a data set, or anything else that
            `sapwood.data.load` takes, read as `fit` reads it.
        steps: how many steps to trace. Before them run 3 warm-up steps, and ``steps`` steps without the profiler.
        batch_size: examples in a batch of a data set; None means 32. If it is set, a dict of arrays is a data set too.
        seed: the seed of the initial parameters and of the order of the data.
        out: the directory for the raw trace, which Perfetto and XProf read; None means a temporary directory.

    Returns:
        A `Profile`.

    Raises:
        ConfigError: ``steps`` is below 1, a batch has no examples along its first dimension, the trainer is not
            compiled (``jit=False``), or another profile is being taken.

    >>> import numpy as np, optax
    >>> from sapwood import layers as L
    >>> from sapwood.train import Trainer, supervised
    >>> model = lambda v, x: L.Dense(2)(v.head, L.Dense(8)(v.body, x))
    >>> batch = {"x": np.ones((4, 3), "float32"), "label": np.zeros(4, "int32")}
    >>> profile(Trainer(supervised(model, inputs="x"), optax.sgd(0.1)), batch, steps=2).row("head").layer
    True
    """
    if steps != int(steps) or steps < 1:
        raise ConfigError(f"profile(steps={steps}): at least 1 step is expected")
    steps = int(steps)
    if not trainer.jit:
        raise ConfigError("profile: Trainer(jit=False) runs every operation by itself; profile a trainer with jit=True")
    directory = File(tempfile.mkdtemp(prefix="sapwood-profile-") if out is None else out).expanduser()
    directory.mkdir(parents=True, exist_ok=True)  # fails here, before anything compiles, if it cannot be made
    with _feed(trainer, data, batch_size, seed) as following:
        batch = following()
        plan = state_plan.plan(trainer, batch)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
        with _names_kept():
            step = trainer.compiled.train(plan.shardings).lower(plan.shapes, shapes).compile()
        calls = trace_calls(trainer.objective, (jax.eval_shape(lambda x: x, batch),), train=True, policy=trainer.policy)
        program = Program(step.as_text(), (call.path for call in calls.calls.values()))
        loop = _Loop(step, plan.make(seed, batch), following)
        loop.run(WARM)
        untraced = loop.run(steps)
        file = _traced(loop, steps, directory)
    return _profile(program, device_trace.read(file, program.name), steps, untraced / steps, str(directory))


@contextlib.contextmanager
def _feed(trainer: Trainer, data: Any, batch_size: int | None, seed: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """A context with a function that returns the next batch on the devices."""
    if isinstance(data, Mapping) and batch_size is None:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(dict(data))]
        if not shapes or not shapes[0]:
            raise ConfigError(
                "profile: one batch is a dict of arrays with the examples along their first dimension, got "
                f"{ {name: describe(x) for name, x in data.items()} }"
            )
        trainer.check_batch_size(shapes[0][0])
        batch = trainer.put(data)
        yield lambda: batch
        return
    size = trainer.check_batch_size(32 if batch_size is None else batch_size)
    feed = to_device(batches(as_dataset(data), size, seed=seed), trainer.batch_sharding)
    try:
        yield lambda: next(feed)
    finally:
        feed.close()


@contextlib.contextmanager
def _names_kept() -> Iterator[None]:
    """Put metadata into the keys of JAX's persistent compilation cache while the step is compiled.

    Otherwise the cache could return a program with equal operations but other layer names.
    """
    before = jax.config.jax_compilation_cache_include_metadata_in_key  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


class _Loop:
    """Runs steps as `fit` does: up to `AHEAD` steps are dispatched before the oldest is waited for."""

    def __init__(self, step: Callable[..., Any], state: Any, following: Callable[[], dict[str, Any]]):
        self.step, self.state, self.following = step, state, following

    def run(self, steps: int) -> float:
        """Run steps; returns the seconds from the dispatch of the first to the end of the last."""
        pending: deque[Any] = deque()
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        with jax.profiler.TraceAnnotation(device_trace.STEPS):
            for number in range(steps):
                with jax.profiler.TraceAnnotation(device_trace.FEED):
                    batch = self.following()
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    self.state, found = self.step(self.state, batch)
                pending.append(found)
                if len(pending) > AHEAD:
                    jax.block_until_ready(pending.popleft())
            jax.block_until_ready(self.state)
        return time.perf_counter() - begin


def _traced(loop: _Loop, steps: int, directory: File) -> File:
    """Run steps under the profiler; returns the file that it wrote."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's tracer slows the host down and names no layers
    before = set(directory.rglob("*.xplane.pb"))
    try:
        jax.profiler.start_trace(str(directory), profiler_options=options)
    except RuntimeError as error:
        raise ConfigError(f"profile: the profiler of JAX cannot start: {error}") from error
    try:
        loop.run(steps)
    finally:
        jax.profiler.stop_trace()
    (file,) = set(directory.rglob("*.xplane.pb")) - before
    return file


def _profile(program: Program, trace: device_trace.Trace, steps: int, untraced: float, directory: str) -> Profile:
    """The `Profile` of a trace: the mean of its devices. ``untraced`` is in seconds a step."""
    shares = [device_trace.divide_time(spans, trace, lambda name: program.place(name).container)
              for spans in trace.devices.values()]  # fmt: skip
    if not shares:
        raise ConfigError(f"profile: JAX's profiler saw no operation on this backend; its raw trace is in {directory}")
    each = steps * len(shares)
    parts: dict[Place, float] = defaultdict(float)
    for part in shares:
        for name, seconds in part.seconds.items():
            parts[program.place(name)] += seconds / each
        for name, seconds in part.rest.items():
            parts[Place((name,), "", "")] += seconds / each
    first, last = trace.window
    busy = sum(sum(part.seconds.values()) for part in shares)
    device = jax.devices()[0]
    return Profile(
        rows=tuple(_rows(parts)),
        seconds=(last - first) / 1e9 / steps,
        untraced=untraced,
        steps=steps,
        device=f"{device.platform} ({device.device_kind})"
        if device.platform != device.device_kind
        else device.platform,
        devices=len(shares),
        shared=sum(x for place, x in parts.items() if place.mixed) * steps / ((last - first) / 1e9),
        concurrency=sum(part.threads for part in shares) / busy if busy else 0.0,
        trace=directory,
    )


def _rows(parts: Mapping[Place, float]) -> list[Row]:
    """One row for each path and each beginning of it. Parents precede their children; siblings are slowest first."""
    under: dict[Path, dict[Place, float]] = {}
    for place, seconds in parts.items():
        for k in range(1, len(place.path) + 1):
            under.setdefault(place.path[:k], {})[place] = seconds
    total = {path: sum(found.values()) for path, found in under.items()}

    def row(path: Path) -> Row:
        kinds: dict[str, float] = defaultdict(float)
        passes: dict[str, float] = defaultdict(float)
        for place, seconds in under[path].items():
            kinds[place.kind] += seconds
            passes[place.direction] += seconds
        own = sum(seconds for place, seconds in under[path].items() if place.path == path)
        slowest = dict(sorted(kinds.items(), key=lambda kind: -kind[1]))
        return Row(path, total[path], own, passes[FORWARD], passes[BACKWARD], slowest)

    paths = sorted(under, key=lambda path: [(-total[path[:k]], path[:k]) for k in range(1, len(path) + 1)])
    return [row(path) for path in paths]
