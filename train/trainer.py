"""`Trainer`: how a model is trained, as one frozen value; its methods are thin doors to the files that do the work."""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from sapwood.core import migration_hints
from sapwood.core.errors import ConfigError
from sapwood.core.layer import describe
from sapwood.train import evaluation
from sapwood.train.config import Config
from sapwood.train.loop import fit, programs
from sapwood.train.state import ema, plan
from sapwood.train.state.train_state import TrainState
from sapwood.train.step.step import train_step


def _of_a_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is given a state and data, and says so where they are something else."""
    what = f"trainer.{method.__name__}"

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        state = args[0] if args else options.get("state")
        if isinstance(state, fit.Result):
            raise ConfigError(
                f"{what} was given all that fit gives back, (state, history); here it is {what}(result.state, data)"
            )
        if not isinstance(state, TrainState):
            kind = type(state).__name__
            raise ConfigError(f"{what}(state, data) takes a TrainState first, such as fit gives back; got {kind}")
        size = args[2] if len(args) > 2 else options.get("batch_size")
        if size is not None and (not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1):
            raise ConfigError(
                f"{what}(batch_size=...) is a whole number, at least 1, got {describe(size)}; inputs and labels are "
                f"one data set: {what}(state, (x, y))"
            )
        return method(self, *args, **options)

    return run


@dataclasses.dataclass(frozen=True)
class Trainer(Config):
    """A configuration of training, without any array in it.

    What `fit`, `evaluate` and `predict` compile is kept for the next call. Where the model's code was edited meanwhile,
    or a function or global that it names, each of them traces it anew.

    Attributes:
        objective: a pure function ``(v, batch) -> (loss, metrics)``; `supervised` makes one.
        optimizer: any optax transformation; it is given ``value``, ``grad`` and ``value_fn``, so L-BFGS with its line
            search works. So does `optax.contrib.reduce_on_plateau`, which counts steps and watches the training loss;
            `callbacks.ReduceOnPlateau` counts epochs and watches validation.
        mesh, rules: where arrays live: `sapwood.mesh` or its string, "replica=2,fsdp=2,tensor=2"; the name of a table,
            "fsdp+tensor", or `sapwood.parallel.Rules`. None is one device; without rules they follow the mesh.
        policy: a `Policy` or a compute dtype; "float16" brings dynamic loss scaling.
        trainable: path patterns of what trains: "head", "**/lora_*", or ("!encoder/norm", "encoder"), of which the
            first that fits decides; "!stem" is everything but the stem, None is everything. A layer of which nothing
            trains keeps its state, and its batch norm runs as in evaluation (as in Keras; `sw.frozen` tells a layer).
        ema: decay of a running mean of the parameters and of batch statistics, which evaluation and saved models use.
            It begins with less, ``(1 + n) / (10 + n)`` after n steps, so that it is of use in short runs (`train.ema`).
        accumulate: micro-batches that a batch is cut into, one after the other, for one optimizer step.
        clip: largest global norm of the gradient.
        learning_rate: the schedule or number given to the optimizer, once more, to be logged; not needed where the
            optimizer is made with `optax.inject_hyperparams`.
        scaling: how the loss scale of float16 moves; made by default for a float16 policy.
        offload: "optimizer" keeps the optimizer's state in the host's memory between steps; needs a mesh.
        jit: False runs every step as plain Python, so that a breakpoint in a layer stops there.
        checks: collect `v.check` and the finiteness of loss and gradients on the device; a failure raises `CheckError`.
            Gradients of a finite loss are left to an optimizer that looks after them, as `optax.apply_if_finite` and
            `optax.zero_nans` do. A loss that is not finite fails in any case, for no optimizer keeps batch statistics
            from it; False leaves that to the optimizer too.
        compiler_options: XLA's options for what this trainer compiles, by name, such as
            ``{"xla_tpu_scoped_vmem_limit_kib": 65536}``; they win over XLA_FLAGS. XLA raises for one that it lacks.

    Raises `ConfigError` for values that cannot be.

    >>> import optax, jax.numpy as jnp
    >>> from sapwood.train import metrics as M, supervised
    >>> model = lambda v, x: x @ v.param("w", (2, 3), jax.nn.initializers.zeros)
    >>> trainer = Trainer(supervised(model, inputs="x"), optax.sgd(0.5))
    >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 2])}
    >>> state = trainer.init(0, batch)
    >>> step = jax.jit(trainer.step, donate_argnums=0)     # your own loop
    >>> state, metrics = step(state, batch)
    >>> int(state.step), M.compute(metrics)
    (1, {'accuracy': 0.5, 'checks': True, 'loss': 1.0986123085021973})
    """

    _programs = None  # no field, for they say nothing about how a model is trained

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise migration_hints.attribute(self, name)

    # ---- the parts --------------------------------------------------------------------------------------------------

    def init(self, key: Any, batch: Mapping[str, Any], params: Any = None, state: Any = None) -> TrainState:
        """The state before the first step, each array born where it will live.

        ``key`` is a random key or a seed, ``batch`` a batch of arrays or of shapes (arrays where initialisers read
        data). The parameters are those of ``sw.init(objective, key, batch)``, unless they are given: ``params``, and
        the model's ``state``, are then copied to where they will live, and nothing is drawn for them. What they were
        trained on goes with them by ``state.replace(features=artifact.features)``. Raises `ConfigError` where
        ``trainable`` matches nothing, the batch does not divide over the mesh, or what is given is not what the model
        declares.
        """
        batch = _batch("init(key, batch)", batch)
        self.check_batch_size(jax.tree.leaves(batch)[0].shape[0])
        return plan.plan(self, batch).make(key, batch, params, state)

    def restart(self, state: TrainState) -> TrainState:
        """A state's own parameters, model state and features at step 0 again, for another run; not its running means.

        The optimizer's memory, and with it the count that its schedule goes by, running means and loss scale are new,
        and what is drawn is drawn anew. (``state.replace(step=0)`` would leave a schedule at its end.) The state may be
        that of another trainer of the same model, with another optimizer.

        >>> import jax.numpy as jnp, optax
        >>> from sapwood.train import supervised
        >>> model = lambda v, x: x @ v.param("w", (2, 3), jax.nn.initializers.zeros)
        >>> trainer = Trainer(supervised(model, inputs="x"), optax.sgd(optax.cosine_decay_schedule(1.0, 1)))
        >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 2])}
        >>> done, _ = trainer.step(trainer.init(0, batch), batch)
        >>> again = trainer.restart(done)
        >>> int(again.step), bool((again.params["w"] == done.params["w"]).all()), int(again.opt_state[1].count)
        (0, True, 0)
        """
        return plan.restart(self, state)

    def step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """One training step, a pure function: ``jax.jit(trainer.step, donate_argnums=0)`` in a loop of your own;
        `train.compiling.compiled` compiles that as `fit` does.

        The metrics are accumulators (`Metric`) or scalars by name (`metrics.compute` gives values): "loss" and what the
        objective gives, then "auxiliary_loss" where layers add one, "gradient_norm" with ``clip``, "learning_rate"
        where the optimizer holds it or the trainer was given it, "skipped_steps" under loss scaling, and with
        ``checks`` the bits under "checks" (`Flags.failed` lists what failed).
        """
        with self.tracing():
            batch = _batch("step(state, batch)", batch)
            after, metrics = train_step(self, state.replace(features=None), batch)
        after = after if self.mesh is None else plan.laid_out(self, after, batch)
        return after.replace(features=state.features), metrics

    def fit(self, data: Any, *targets: Any, **options: Any) -> "fit.Result":
        """Train on a data set; see `sapwood.train.fit` for the options. Returns ``(state, history)``.

        Raises `ConfigError` for ``targets``: inputs and labels are one data set, ``(x, y)``.
        """
        if targets:
            raise ConfigError(
                f"Trainer.fit takes one data set, got {1 + len(targets)}: here it is trainer.fit((x, y), epochs=2)"
            )
        return _fit(self, data, **options)

    @migration_hints.answering("Trainer.evaluate", migration_hints.EVALUATE)
    @_of_a_state
    def evaluate(self, state: TrainState, data: Any, batch_size: int | None = None) -> dict[str, Any]:
        """The metrics over a whole data set, exact whatever the batch size and the mesh.

        As in training, "loss" is the objective's own, and "auxiliary_loss" what layers add to it in this mode: each
        batch's, weighed by its examples. (A mixture of experts adds its losses in training alone.)
        ``data`` is a data set or anything `sapwood.data.load` takes; it is held to ``state.features``, what training
        learned of its own: classes and columns are matched by name (`Dataset.held_to`). The running mean of the
        parameters is used where there is one. Raises `DataError` for an empty data set and for one that means something
        else, `CheckError` where a check fails.
        """
        run = evaluation.Evaluation(self, self.compiled, data, batch_size, learned=state.features)
        return run.settle(run.send(state), state)

    @migration_hints.answering("Trainer.predict", migration_hints.EVALUATE)
    @_of_a_state
    def predict(self, state: TrainState, data: Any, batch_size: int | None = None) -> Any:
        """The model's outputs for every example, in order, as NumPy arrays (examples, ...).

        ``data`` is a data set, or a dict of arrays; its inputs are held to ``state.features``, as in `evaluate`. The
        objective must have ``predict(v, batch)``, as those of `supervised` do. Raises `ConfigError` where it has not,
        `DataError` for no data, or data that means something else.
        """
        return evaluation.predict(self, self.compiled, state, data, batch_size)

    # ---- what the parts share ---------------------------------------------------------------------------------------

    @property
    def compiled(self) -> programs.Programs:
        """The programs of this trainer, made when first used, and anew where its code was edited: see `programs`."""
        code, kept = self.code, self._programs
        if kept is None or kept.code is not code:
            kept = programs.Programs(self, code)
            object.__setattr__(self, "_programs", kept)
        return kept

    def eval_variables(self, state: TrainState) -> tuple[dict, dict]:
        """The parameters and model state that evaluation uses: their running means, where the state keeps some."""
        return ema.eval_variables(state)


def _batch(what: str, batch: Any) -> dict[str, Any]:
    """A batch as a plain dict; `ConfigError` for what is none, as a whole data set is."""
    if isinstance(batch, Mapping) and batch:
        return dict(batch)
    got = f"a {type(batch).__name__}" if not isinstance(batch, Mapping) else "an empty dict"
    hint = "; data.gather(range(8)) is the batch of the first 8 examples" if hasattr(batch, "gather") else ""
    raise ConfigError(f"Trainer.{what}: a batch is a dict of arrays (batch, ...) by name, got {got}{hint}")


_fit = migration_hints.answering("Trainer.fit", migration_hints.FIT)(fit.fit)
Trainer.__init__ = migration_hints.answering("Trainer", migration_hints.TRAINER)(Trainer.__init__)
