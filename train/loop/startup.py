"""`start`: everything before the first step of a run, side by side.

While threads compile the step, the block and the evaluation, the main thread makes the first parameters or reads a
checkpoint. A given state is checked against the plan and copied, so the caller's state stays valid (`_taken`).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapwood.core.errors import ConfigError
from sapwood.core.messages import first_names
from sapwood.data.batching import Batches
from sapwood.data.device_feed import to_device
from sapwood.saving.array_bits import describe_type
from sapwood.saving.digest import describe, named_leaves
from sapwood.train.config import Config
from sapwood.train.evaluation import Evaluation, as_given
from sapwood.train.loop.blocks import StepPrograms, copy
from sapwood.train.loop.programs import Programs
from sapwood.train.record.run_directory import Run
from sapwood.train.state import ema
from sapwood.train.state import plan as state_plan
from sapwood.train.state.train_state import TrainState


class Start(NamedTuple):
    """The result of `start`.

    Attributes:
        programs: the compiled programs of the steps.
        state: the state before the first step.
        info: the info of the checkpoint that the state came from; None if it came from none.
    """

    programs: StepPrograms
    state: TrainState
    info: dict[str, Any] | None


def start(
    config: Config, compiled: Programs, stream: Batches, evaluation: Evaluation | None, record: Run, *,
    seed: int, state: TrainState | None, steps_per_call: int | None,
) -> Start:  # fmt: skip
    """Make or restore the state of a run, and compile its programs at the same time.

    Args:
        config: the config.
        compiled: its programs.
        stream: the batches of the training data.
        evaluation: the evaluation of the validation data, or None. Its step is compiled, too.
        record: the run directory, from which the newest checkpoint is restored.
        seed: the seed of the first parameters.
        state: a state to begin from, which is copied; None makes one.
        steps_per_call: number of steps in a block. None takes what the resumed run has found to be best, or leaves it
            undecided.

    Raises:
        ConfigError: ``state`` is not one of this config, or metrics of the evaluation cannot be merged.
    """
    batch = _first(config, stream)
    plan = state_plan.plan(config, batch)
    key = _key(plan)
    step, several = compiled.sent(plan.shardings)
    programs = StepPrograms(compiled, step, 0.0, several, plan.shapes, key, _shapes(batch))
    with ThreadPoolExecutor(4, thread_name_prefix="sapwood-start") as pool:
        made = pool.submit(compiled.compile, step, plan.shapes.replace(rng=None), key, programs.batch)
        block = _block(pool, programs, steps_per_call)
        if evaluation is not None:
            variables, first = ema.eval_variables(plan.shapes), _first(config, evaluation.batches)
            first = as_given(config, evaluation.batches, first)
            evaluated = pool.submit(compiled.compile, evaluation.step, *variables, _shapes(first))
        restored = record.restore(plan.shapes)
        if restored is not None:
            begin, info = restored
            if steps_per_call is None:
                steps_per_call = info.get("steps_per_call") or record.noted("steps_per_call")
                block = _block(pool, programs, steps_per_call)
        else:
            begin, info = plan.make(seed, batch) if state is None else _taken(state, plan, batch), None
        function, seconds = made.result()
        programs = programs._replace(
            step=function, seconds=seconds, size=steps_per_call, block=None if block is None else block.result()
        )
        if evaluation is not None:
            evaluation.step, _ = evaluated.result()
            if config.jit:  # metrics that cannot be merged raise here, before the first epoch
                tree = evaluation.step.out_tree
                evaluation.check(jax.tree.unflatten(tree, [0] * tree.num_leaves))
        return Start(programs, begin, info)


def _taken(state: Any, plan: state_plan.Plan, batch: dict[str, Any]) -> TrainState:
    """Copy a given state under the shardings of the plan; without a mesh, to the device of the batch.

    Raises `ConfigError` with the paths that differ, if shapes, dtypes or paths are not those of the plan.
    """
    _hold(named_leaves(jax.eval_shape(lambda x: x, state)), named_leaves(plan.shapes))
    given, beside = named_leaves(state), jax.tree.leaves(batch)[0].sharding
    leaves = [_copied(given[name], x.sharding or beside) for name, x in named_leaves(plan.shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(plan.shapes), leaves)


def _copied(x: Any, place: Any) -> jax.Array:
    """Copy an array to a sharding."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # JAX moves no keys between processes
        return jax.random.wrap_key_data(_copied(jax.random.key_data(x), place), impl=jax.random.key_impl(x))
    return copy(jax.device_put(x, place))  # copy last: `device_put` reuses shards that need not move


def _hold(given: dict[str, Any], planned: dict[str, Any]) -> None:
    """Raise the `ConfigError` of `_taken` if a state differs from the plan. Both are dicts from path to leaf."""
    kinds = [
        (name, *(describe_type(*describe(x[name])) for x in (given, planned))) for name in planned if name in given
    ]
    other = {name: f"{name} is {there} there and {here} here" for name, there, here in kinds if there != here}
    lacks = first_names([name for name in planned if name not in given])
    more = first_names([name for name in given if name not in planned])
    parts = [
        lacks and f"it lacks {lacks}",
        more and f"it has {more} in addition",
        first_names([*other.values()], quote=False),
    ]
    if any(parts):
        advice = "trainer.init(key, batch) makes one, around parameters of your own with params= and state="
        if not (lacks or more) and [*other] == ["rng"]:
            advice = (
                "fit draws by JAX's default generator: give state.replace(rng=jax.random.key(0)), or set "
                "jax_default_prng_impl"
            )
        raise ConfigError(
            f"fit(state=...): the state is not one of this trainer: {'; '.join(filter(None, parts))}. {advice}"
        )


def _key(plan: state_plan.Plan) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding of the data of the run's key."""
    data = jax.eval_shape(jax.random.key_data, plan.shapes.rng)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=plan.shapes.rng.sharding)


def _block(pool: ThreadPoolExecutor, programs: StepPrograms, size: int | None) -> Future | None:
    """Begin to compile a block in a thread, if it has a size above 1."""
    return None if size in (None, 1) else pool.submit(programs.compile, size)


def _first(config: Config, passed: Batches) -> dict[str, Any]:
    """Return the first batch, on the devices. An error in the data is raised here, before anything compiles."""
    feed = to_device(passed.seek(0), config.batch_sharding, prefetch=0)
    batch = next(feed)
    passed.seek(0)
    return batch


def _shapes(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes and shardings of a batch."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
