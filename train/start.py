"""The start of a run: everything that can happen at once does. While XLA compiles the step in one thread, the first
parameters are made or a checkpoint is read in another.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapwood.data.batches import Batches
from sapwood.data.device import to_device
from sapwood.train import birth
from sapwood.train.evaluation import Evaluation
from sapwood.train.run import Run
from sapwood.train.state import TrainState


class Start(NamedTuple):
    """The compiled step, the compiled block of steps (None for one at a time), the state to begin from, and the info of
    the checkpoint it came from (None if fresh)."""

    step: Callable[..., Any]
    block: Callable[..., Any] | None
    state: TrainState
    info: dict[str, Any] | None


def start(
    trainer: Any, stream: Batches, evaluation: Evaluation | None, record: Run, *,
    seed: int, state: TrainState | None, block: int = 1,
) -> Start:  # fmt: skip
    """Make or restore the state of a run and compile its step, side by side."""
    batch = _first(trainer, stream)
    plan = birth.plan(trainer, batch)
    step = trainer.compiled.train(plan.shardings)
    with ThreadPoolExecutor(4, thread_name_prefix="sapwood-start") as pool:
        compiled, together = _ahead(pool, trainer, step, plan.shapes, _shapes(batch)), None
        if block > 1:
            several = trainer.compiled.block(plan.shardings)
            together = _ahead(pool, trainer, several, plan.shapes, _shapes(_first(trainer, stream, block)))
        if evaluation is not None:
            params, first = trainer.eval_params(plan.shapes), _first(trainer, evaluation.batches)
            _ahead(pool, trainer, evaluation.step, params, plan.shapes.state, _shapes(first))
        restored = record.restore(plan.shapes)
        if restored is not None:
            begin, info = restored
        else:
            begin, info = plan.make(seed, batch) if state is None else jax.tree.map(jnp.copy, state), None
        return Start(compiled.result(), together and together.result(), begin, info)


def _first(trainer: Any, passed: Batches, block: int | None = None) -> dict[str, Any]:
    """The first batch on the devices, or the first block of them; what is wrong with the data in general is said here,
    before anything compiles."""
    feed = to_device(passed.seek(0), trainer.batch_sharding, prefetch=0, block=block)
    batch = next(feed)
    passed.seek(0)
    return batch


def _shapes(batch: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)


def _ahead(pool: ThreadPoolExecutor, trainer: Any, function: Any, *shapes: Any) -> Future:
    """A compiled function, or the plain one where nothing is compiled."""
    if not trainer.jit:
        done: Future = Future()
        done.set_result(function)
        return done
    return pool.submit(lambda: function.lower(*shapes).compile())
