"""`Trainer`: the configuration of training as one frozen value, with methods that train, evaluate and predict.

The fields are those of `Config`. Files below this one take a `Config`, so none of them imports this file at run time.
Each method checks its arguments and calls the file that does the work. The programs that these methods compile are kept
by `Trainer.compiled` and made again if the code was edited. A call with an unknown option, such as one of Keras, raises
a `TypeError` that names the option here (`core.migration_hints`).
"""

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
    """Decorate a method ``(state, data, batch_size)``: wrong arguments raise a `ConfigError` that says what to pass."""
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
    """The configuration of training: objective, optimizer, mesh, precision and options. It holds no arrays.

    `fit`, `evaluate` and `predict` keep their compiled programs for the next call. If the model's code was edited in
    between, or a function or global that it names, the next call traces it again.

    Attributes:
        objective: a pure function ``(v, batch) -> (loss, metrics)``; `supervised` makes one.
        optimizer: any optax transformation. Its ``update`` gets ``value``, ``grad`` and ``value_fn``, so L-BFGS with
            its line search works. So does `optax.contrib.reduce_on_plateau`, which counts steps and watches the
            training loss; `callbacks.ReduceOnPlateau` counts epochs and watches validation.
        mesh: a mesh made by `sapwood.mesh`, or its string, such as "replica=2,fsdp=2,tensor=2". None is one device.
        rules: the map from logical axes to mesh axes: a `sapwood.parallel.Rules`, or the name of a table, such as
            "fsdp+tensor". None takes the default rules, which use the axes that the mesh has. Rules need a mesh.
        policy: a `Policy` or the name of a compute dtype. "float16" turns on dynamic loss scaling.
        trainable: path patterns of the parameters that train: "head", "**/lora_*", or ("!encoder/norm", "encoder").
            The first pattern that matches a path decides. "!stem" trains everything except the stem; None trains
            everything. A layer of which nothing trains keeps its state, and its batch norm computes as in evaluation,
            as in Keras. A layer asks `sw.frozen` for this.
        ema: decay of the exponential moving average of the trainable parameters and of batch statistics, which
            evaluation and saved models use. It is above 0 and below 1; None keeps no average. After n steps the decay
            is at most ``(1 + n) / (10 + n)``, so that the average is useful in short runs (`train.state.ema`).
        accumulate: number of micro-batches of a batch. They run one after the other, for one optimizer step.
        clip: largest global norm of the gradient, above 0. None does not clip.
        learning_rate: the schedule or number that the optimizer was made with, given again so that it is logged. It
            is not needed if the optimizer is made with `optax.inject_hyperparams`.
        scaling: the `LossScale` that adapts the loss scale of float16. None means `LossScale()` for a float16 policy.
        offload: "optimizer" keeps the optimizer state in host memory between steps; it needs a mesh. None keeps the
            state on the devices.
        jit: False runs every step as plain Python, so that a breakpoint in a layer stops there.
        checks: True collects `v.check` and the finiteness of loss and gradients on the device; a failure raises
            `CheckError`. Non-finite gradients of a finite loss are no failure if the optimizer handles them, as
            `optax.apply_if_finite` and `optax.zero_nans` do. A non-finite loss is always a failure, because no
            optimizer keeps it out of the batch statistics. False leaves that to the optimizer too.
        compiler_options: XLA's options for the programs of this trainer, a dict by name, such as
            ``{"xla_tpu_scoped_vmem_limit_kib": 65536}``. They override XLA_FLAGS. XLA raises for an unknown option.

    Raises:
        ConfigError: a field has an invalid value, or two fields do not fit together.

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

    _programs = None  # the `Programs`; not a field, because they are no part of the configuration

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise migration_hints.attribute(self, name)

    # ---- training, evaluation, prediction ---------------------------------------------------------------------------

    def init(self, key: Any, batch: Mapping[str, Any], params: Any = None, state: Any = None) -> TrainState:
        """Make the state before the first step. Every array is created under its final sharding.

        The parameters and the model state are those of ``sw.init(objective, key, batch)``, unless they are given. Given
        arrays are copied to their final sharding, and nothing is drawn for them. To also keep the features that they
        were trained on, use ``state.replace(features=artifact.features)``.

        Args:
            key: a random key or an integer seed.
            batch: a dict of arrays ``(batch, ...)``, or of shapes. Initializers that read data need arrays.
            params: the model's parameters, a nested dict of arrays; None draws them.
            state: the model's state, a nested dict of arrays; None makes it.

        Raises:
            ConfigError: a pattern of ``trainable`` has no effect or nothing is left to train; the batch does not divide
                into micro-batches or over the mesh; or the given arrays differ from what the model declares.
        """
        batch = _batch("init(key, batch)", batch)
        self.check_batch_size(jax.tree.leaves(batch)[0].shape[0])
        return plan.plan(self, batch).make(key, batch, params, state)

    def restart(self, state: TrainState) -> TrainState:
        """Return a state at step 0 for another run, with the parameters, model state and features of ``state``.

        The optimizer state is new, and with it the count that its schedule follows. The running means start again from
        the parameters, the loss scale starts again, and random draws are new. (``state.replace(step=0)`` would leave a
        schedule at its end.) ``state`` may come from another trainer of the same model, with another optimizer.

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
        """Do one training step. It is a pure function.

        In a loop of your own, use ``jax.jit(trainer.step, donate_argnums=0)``. `runtime.compile_options.compiled`
        compiles that as `fit` does.

        Args:
            state: the state before the step.
            batch: a dict of arrays ``(batch, ...)``.

        Returns:
            The state after the step, and the metrics: a dict of accumulators (`Metric`) or scalars, whose values
            `metrics.compute` gives. It holds "loss" and the metrics of the objective; "auxiliary_loss" if layers add a
            loss; "gradient_norm" with ``clip``; "learning_rate" if the optimizer state holds it or the trainer was
            given it; "skipped_steps" under loss scaling; and with ``checks`` the bits under "checks", of which
            `Flags.failed` lists the failed ones.
        """
        with self.tracing():
            batch = _batch("step(state, batch)", batch)
            after, metrics = train_step(self, state.replace(features=None), batch)
        after = after if self.mesh is None else plan.laid_out(self, after, batch)
        return after.replace(features=state.features), metrics

    def fit(self, data: Any, *targets: Any, **options: Any) -> "fit.Result":
        """Train on a data set; see `sapwood.train.fit` for the options. Returns ``(state, history)``.

        Raises `ConfigError` if ``targets`` are given: inputs and labels are one data set, ``(x, y)``.
        """
        if targets:
            raise ConfigError(
                f"Trainer.fit takes one data set, got {1 + len(targets)}: here it is trainer.fit((x, y), epochs=2)"
            )
        return _fit(self, data, **options)

    @migration_hints.answering("Trainer.evaluate", migration_hints.EVALUATE)
    @_of_a_state
    def evaluate(self, state: TrainState, data: Any, batch_size: int | None = None) -> dict[str, Any]:
        """Compute the metrics over a whole data set. They are exact for any batch size and any mesh.

        "loss" is the loss of the objective, as in training. "auxiliary_loss" is what layers add in this mode, averaged
        over the batches with their numbers of examples as weights. (A mixture of experts adds its losses in training
        only.) If the state keeps running means of the parameters, these are used.

        Args:
            state: the state to evaluate.
            data: a data set, or anything that `sapwood.data.load` takes. It is converted to ``state.features``, the
                features of the training data: classes and columns are matched by name (`Dataset.held_to`).
            batch_size: examples of a batch. None takes at most 256, rounded up to what the mesh divides.

        Returns:
            A dict from the name of each metric to its value.

        Raises:
            ConfigError: ``state`` or ``batch_size`` is invalid, or the metrics of several batches cannot be merged.
            DataError: the data set is empty, or cannot be converted to the features of the training data.
            CheckError: a check fails.
        """
        run = evaluation.Evaluation(self, self.compiled, data, batch_size, learned=state.features)
        return run.settle(run.send(state), state)

    @migration_hints.answering("Trainer.predict", migration_hints.EVALUATE)
    @_of_a_state
    def predict(self, state: TrainState, data: Any, batch_size: int | None = None) -> Any:
        """Compute the model's outputs for every example, in order, as NumPy arrays ``(examples, ...)``.

        The objective must have a method ``predict(v, batch)``; those of `supervised` have it.

        Args:
            state: the state whose parameters are used; their running means if it keeps some.
            data: a data set, or a dict of arrays. Its inputs are converted to ``state.features``, as in `evaluate`.
            batch_size: examples of a batch; None chooses a size.

        Raises:
            ConfigError: the objective has no ``predict``.
            DataError: the data set is empty, or cannot be converted to the features of the training data.
        """
        return evaluation.predict(self, self.compiled, state, data, batch_size)

    # ---- programs and variables that these methods share ------------------------------------------------------------

    @property
    def compiled(self) -> programs.Programs:
        """The compiled programs of this trainer. They are made at first use, and again if its code was edited."""
        code, kept = self.code, self._programs
        if kept is None or kept.code is not code:
            kept = programs.Programs(self, code)
            object.__setattr__(self, "_programs", kept)
        return kept

    def eval_variables(self, state: TrainState) -> tuple[dict, dict]:
        """Return the parameters and model state that evaluation uses: the running means, if the state keeps some."""
        return ema.eval_variables(state)


def _batch(what: str, batch: Any) -> dict[str, Any]:
    """Return a batch as a plain dict. Raises `ConfigError` for an empty one and for other types, such as a data set."""
    if isinstance(batch, Mapping) and batch:
        return dict(batch)
    got = f"a {type(batch).__name__}" if not isinstance(batch, Mapping) else "an empty dict"
    hint = "; data.gather(range(8)) is the batch of the first 8 examples" if hasattr(batch, "gather") else ""
    raise ConfigError(f"Trainer.{what}: a batch is a dict of arrays (batch, ...) by name, got {got}{hint}")


_fit = migration_hints.answering("Trainer.fit", migration_hints.FIT)(fit.fit)
Trainer.__init__ = migration_hints.answering("Trainer", migration_hints.TRAINER)(Trainer.__init__)
