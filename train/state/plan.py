"""`plan`: the shapes and shardings of a training state, from the model's declarations, and the function that makes it.

A plan needs only shapes; no array is made for it. It is made once for each shape of the batch and kept in `Code.plans`.
`Plan.make` then creates every array under its final sharding. `laid_out` gives the state after a step the same
shardings. `beside` has the shardings of gradients, moments and optimizer state, for a step in which these are split
further than the parameters (ZeRO-1) or offloaded.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapwood import parallel
from sapwood.core.errors import ConfigError, InputError
from sapwood.core.init import initializer, run_once_options
from sapwood.core.paths import leaves, nest
from sapwood.core.rng import as_key
from sapwood.core.spec import Spec, spec
from sapwood.core.unrolled_trees import Stacks, stacks
from sapwood.parallel.wasted_axes import warn_of_wasted
from sapwood.train.config import Config
from sapwood.train.objectives.supervised import takes_mask
from sapwood.train.optimizers.blockwise import wrap_for_stacks
from sapwood.train.state import ema, offload, trainable
from sapwood.train.state.given_variables import copy_checked
from sapwood.train.state.train_state import TrainState


class Plan(NamedTuple):
    """The layout of a training state, and the function that makes it.

    Attributes:
        make: ``make(key, batch, params=None, state=None)`` returns the state. Given ``params`` and ``state`` are copied
            and not drawn.
        shapes: the state as `jax.ShapeDtypeStruct`, with shardings if there is a mesh.
        shardings: the state as shardings; None without a mesh.
    """

    make: Callable[..., TrainState]
    shapes: TrainState
    shardings: TrainState | None


def plan(config: Config, batch: Any) -> Plan:
    """Return the plan of the training state for batches like this one, a dict of arrays or shapes.

    It is made once for each structure, shapes and dtypes of a batch, and kept as long as the code is not edited.
    """
    batch = jax.eval_shape(lambda x: x, dict(batch))
    leaves, structure = jax.tree.flatten(batch)
    flags = jax.config.jax_enable_x64, jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
    alike = flags, structure, tuple((x.shape, x.dtype, x.weak_type) for x in leaves)
    plans = config.code.plans
    if alike not in plans:
        with config.tracing():
            plans[alike] = _plan(config, batch)
    return plans[alike]


def _what_it_was_given(objective: Any, batch: dict, error: Exception) -> Iterator[str]:
    """Yield hints for an error in a user's own objective. It may be a model, or use a plain dict like a cursor."""
    name = getattr(objective, "__name__", type(objective).__name__)
    if isinstance(getattr(error, "obj", None), dict):
        yield "(a plain function reads its variables from a cursor: sw.bind(params) makes one of a dict)"
    if not takes_mask(objective):
        entries = ", ".join(f"{key} {x.dtype}{list(x.shape)}" for key, x in batch.items() if hasattr(x, "shape"))
        yield (
            f"in the objective {name}(v, batch), where batch is a dict of {entries}; a model, a function of inputs, "
            "goes into sw.supervised(model)"
        )


def _plan(config: Config, batch: dict) -> Plan:
    """Make the plan for the shapes of a batch."""
    try:
        declared = spec(config.objective, batch, policy=config.policy)
    except (TypeError, AttributeError, InputError) as error:
        for note in _what_it_was_given(config.objective, batch, error):
            error.add_note(note)
        raise
    trainable.check(declared.params, config.trainable)
    stacked = stacks(declared.params)
    complete = functools.partial(_complete, config, stacked=stacked)
    variables = jax.tree.map(lambda param: param.struct, tuple(declared))
    shapes = jax.eval_shape(complete, jax.eval_shape(lambda: jax.random.key(0)), *variables)
    shardings = born = None
    if config.mesh is not None:
        shardings = _shardings(config, declared, shapes)
        split = [*jax.tree.leaves(shardings.params), config.batch_sharding]
        place = config.place
        warn_of_wasted(
            config.objective, batch, mesh=place.mesh, rules=place.rules, shardings=split, policy=config.policy
        )
        shapes = jax.tree.map(_struct, shapes, shardings)
        born = shardings.params, shardings.state

    @functools.cache
    def first(*given: bool) -> Callable[..., tuple[dict, dict]]:
        return initializer(
            config.objective, declared,
            data=True, policy=config.policy, place=config.place, shardings=born, given=given,
        )  # fmt: skip

    @jax.transfer_guard("allow")  # the caller asks for these transfers, as in `sw.init`
    def make(key: Any, batch: Any, params: Any = None, state: Any = None) -> TrainState:
        key, kinds = as_key(key), zip(("params", "state"), declared, (params, state), born or (None, None), strict=True)
        there = tuple(
            None if x is None else copy_checked(f"Trainer.init: the {kind} given", tree, x, where)
            for kind, tree, x, where in kinds
        )
        with config.tracing():
            variables = first(*(x is not None for x in there))(key, batch, there=there)
            once = jax.jit(
                complete, out_shardings=shardings, donate_argnums=(1, 2), compiler_options=run_once_options(key)
            )
            return once(key, *variables)

    return Plan(make, shapes, shardings)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _complete(config: Config, key: Any, params: dict, state: dict, stacked: Stacks = ()) -> TrainState:
    """Make the state at step 0 from parameters and model state.

    It gets a new optimizer state, a key folded from ``key``, and what options need: running means, loss scale, ``ok``.
    """
    trained, _ = trainable.split(params, config.trainable)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        state=state,
        opt_state=wrap_for_stacks(config.optimizer, stacked).init(trained),
        rng=jax.random.fold_in(key, 2),  # init draws from the key itself, and from fold 1 for data-dependent values
        ema=None if config.ema is None else ema.first(trained),
        ema_state=None if config.ema is None else ema.first(ema.averaged_entries(state)),
        scale=None if config.scaling is None else config.scaling.init(),
        ok=jnp.bool_(True) if config.checks else None,
        stacks=stacked,
    )


def restart(config: Config, state: TrainState) -> TrainState:
    """Return a state at step 0 with the variables of another; see `Trainer.restart`."""

    stacked = stacks_of(config, state)

    def fresh(key: Any, *variables: dict) -> TrainState:  # it copies, so that training one state leaves the other whole
        key = jax.random.fold_in(key, state.step)
        return _complete(config, key, *jax.tree.map(jnp.copy, variables), stacked=stacked)

    return jax.jit(fresh)(state.rng, state.params, state.state).replace(features=state.features)


def _shardings(config: Config, declared: Spec, shapes: TrainState) -> TrainState:
    """Return the shardings of the whole state on the mesh."""
    params = parallel.param_shardings(declared.params, config.mesh, config.rules)
    states = parallel.state_shardings(declared.state, config.mesh)
    there = dict(leaves(states))
    beside = _beside(config, declared, params, shapes)
    whole = parallel.replicated(config.mesh)
    return TrainState(
        step=whole,
        params=params,
        state=states,
        opt_state=beside.opt_state if beside.host is None else beside.host,
        rng=whole,
        ema=None if config.ema is None else beside.moments,
        ema_state=None if config.ema is None else nest((path, there[path]) for path, _ in leaves(shapes.ema_state)),
        scale=jax.tree.map(lambda _: whole, shapes.scale),
        ok=None if shapes.ok is None else whole,
        stacks=shapes.stacks,
    )


def laid_out(config: Config, state: TrainState, batch: Any) -> TrainState:
    """Constrain a state that a step computed to the shardings of `Plan.make`.

    Without this constraint XLA chooses the shardings: it split a bias that was replicated before, and the next step
    needed another program. The plan is the one that the state was made by, found by its shapes, since a batch that
    takes another path through the model may declare less. A state of another structure than the plan's is returned
    unchanged.
    """
    shardings = _plan_of(config, state, batch).shardings
    if shardings is None or jax.tree.structure(shardings) != jax.tree.structure(state):
        return state
    if config.offload is not None:  # the optimizer state is in host memory, where a constraint has no effect
        shardings, host = shardings.replace(opt_state=None), state.opt_state
        return jax.lax.with_sharding_constraint(state.replace(opt_state=None), shardings).replace(opt_state=host)
    return jax.lax.with_sharding_constraint(state, shardings)


def stacks_of(config: Config, state: TrainState, batch: Any = None) -> Stacks:
    """Return which parameters of a state are stacks of blocks.

    A state that was made by hand does not hold this. It is then taken from the plan for ``batch``.

    Raises:
        ConfigError: the state does not hold its stacks, and ``batch`` is None.
    """
    if state.stacks is None and batch is None:
        raise ConfigError("this TrainState does not say which parameters are stacks: take one that Trainer.init made")
    return _plan_of(config, state, batch).shapes.stacks if state.stacks is None else state.stacks


def _plan_of(config: Config, state: TrainState, batch: Any) -> Plan:
    """Return an existing plan that has the shapes of the state, or else the plan for the batch."""
    known = next((made for made in config.code.plans.values() if _is_of(made, state)), None)
    return known or plan(config, batch)


def _is_of(plan: Plan, state: TrainState) -> bool:
    """Return True if the plan has the structure and the shapes of the state."""
    (planned, one), (there, other) = (jax.tree.flatten(x.replace(stacks=None)) for x in (plan.shapes, state))
    return one == other and all(a.shape == b.shape for a, b in zip(planned, there, strict=True))


class Beside(NamedTuple):
    """Shardings that a step imposes on parameters, gradients, moments and optimizer state.

    Attributes:
        params: shardings of the trainable parameters.
        moments: shardings of their gradients, moments and running means.
        opt_state: shardings of the optimizer state during a step.
        host: shardings of the optimizer state between steps if it is offloaded to host memory, else None.
    """

    params: dict
    moments: dict
    opt_state: Any
    host: Any = None


def _beside(config: Config, declared: Spec, params: dict, state: TrainState) -> Beside:
    """Make the `Beside`, from the shardings of all parameters and from the shapes in ``state``."""
    moments = parallel.moment_shardings(declared.params, config.mesh, config.rules)
    params, moments, structs = (trainable.split(tree, config.trainable)[0] for tree in (params, moments, state.params))
    optimizer = wrap_for_stacks(config.optimizer, stacks(declared.params))
    opt_state = parallel.opt_shardings(optimizer, structs, moments, config.mesh)
    host = None if config.offload is None else offload.on_host(opt_state, state.opt_state)
    return Beside(params, moments, opt_state, host)


def beside(config: Config, state: TrainState, batch: Any) -> Beside | None:
    """Return the shardings that a step must impose on gradients, moments and optimizer state.

    None means that these are sharded like the parameters. XLA infers that by itself.
    """
    if config.offload is None and (config.place is None or not config.place.rules.beside):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parallel.ShardingWarning)  # these warnings came when the plan was made
        declared = spec(config.objective, jax.eval_shape(lambda x: x, batch), policy=config.policy)
        params = parallel.param_shardings(declared.params, config.mesh, config.rules)
        return _beside(config, declared, params, state)
