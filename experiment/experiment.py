"""`Experiment`: a recipe and its run directory. It trains, resumes, evaluates, restores and saves the run.

A run directory holds ``config.json`` (the recipe and its options), ``metrics.jsonl``, ``tensorboard/``,
``checkpoints/``, ``curves.png`` and, when the run is over, ``model/``: the artifact that `sapwood.load` reads. A run
directory may come from a stranger: `Experiment.open` checks the types in its config and runs a recipe file only with
the user's consent.
"""

import dataclasses
import json
import os
import sys
import types
import typing
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.version import __version__
from sapwood.experiment.finding import agree, find_of_run
from sapwood.experiment.recipe import Recipe
from sapwood.saving import checksummed_json


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe and the directory of its run.

    Args:
        name: the name of a built-in recipe, or the absolute path of a recipe file.
        recipe: the recipe with its hyper-parameters.
        directory: the run directory.
        options: options of the `Trainer` that depend on the machine: mesh, rules, jit.
    """

    name: str
    recipe: Recipe
    directory: Path
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls, directory: str | os.PathLike, options: dict[str, Any] | None = None, trust: str | None = None
    ) -> "Experiment":
        """The experiment of a run directory.

        Args:
            directory: the run directory.
            options: options of the `Trainer` that depend on the machine: mesh, rules, jit.
            trust: the path of the run's recipe file, or of a copy of it. The file is run.

        Raises:
            CheckpointError: there is no run, its config does not fit the recipe, or its recipe is a file that this user
                has not run in its present version and that `trust` does not name.
            ConfigError: the recipe cannot be found or imported.
        """
        directory = Path(directory).expanduser()
        config = read_config(directory)
        if config is None:
            known = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/config.json"))[-3:])
            hint = f" (runs here: {known})" if known else ""
            raise CheckpointError(f"{directory} is no run: it has no config.json{hint}")
        kind = find_of_run(config["recipe"], trust, directory)
        given = _from_json(config["options"])
        _check_types(directory, kind, given)
        try:
            recipe = kind(**given)
        except TypeError as error:
            raise CheckpointError(f"{directory} is a run of another version of the recipe {config['recipe']}: {error}"
                                  ) from None  # fmt: skip
        return cls(config["recipe"], recipe, directory, options or {})

    @cached_property
    def data(self) -> tuple[Any, Any]:
        """The training data and the test data. Raises `ConfigError` if the recipe does not return two data sets."""
        from sapwood.train.evaluation import as_dataset

        found = self.recipe.data()
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ConfigError(f"data() of the recipe {type(self.recipe).__name__} gives a {type(found).__name__}; the "
                              "data to train on and the data to test on are expected: return train, test")  # fmt: skip
        train = as_dataset(found[0])
        return train, as_dataset(found[1], train.features, "data to test on")

    @cached_property
    def batch_size(self) -> int:
        """Examples in a batch. Raises `ConfigError` if it is below 1."""
        if self.recipe.batch_size < 1:
            raise ConfigError(f"batch_size is {self.recipe.batch_size}; at least 1 is expected")
        return self.recipe.batch_size

    @cached_property
    def steps(self) -> int:
        """Steps of the whole run. Raises `ConfigError` if the recipe has no epochs."""
        if self.recipe.epochs < 1:
            raise ConfigError(f"epochs is {self.recipe.epochs}; at least 1 is expected")
        from sapwood.data.batching import batches

        return self.recipe.epochs * batches(self.train_data[0], self.batch_size).steps_per_epoch

    @cached_property
    def train_data(self) -> tuple[Any, Any]:
        """The data to train on, and the data held out of it for validation (None if nothing is held out)."""
        if not self.recipe.validation:
            return self.data[0], None
        return self.data[0].split(self.recipe.validation, seed=self.recipe.seed)

    @cached_property
    def trainer(self) -> Any:
        """The recipe's trainer with the options of this machine."""
        return self.recipe.trainer(self.steps, **self.options)

    @cached_property
    def writer(self) -> Any:
        """A context manager that locks the run directory, so that no other process writes there."""
        from sapwood.train.record.writer_lock import DirectoryLock

        return DirectoryLock(self.directory)

    def begin(self, resume: bool | str) -> bool:
        """Write the config of a new run, or check the config of a run that is resumed.

        Args:
            resume: False starts a new run, True resumes one with equal hyper-parameters. "anyway" resumes it with
                other ones too, and prints the differences.

        Returns:
            True if the config was written, because there is no checkpoint or no config yet; False if the existing run
            continues.

        Raises:
            ConfigError: the directory cannot be written (or is a file), or it holds a run with another recipe or other
                hyper-parameters.
            CheckpointError: the directory holds a run or a model and `resume` is False, or its config cannot be read.
        """
        from sapwood.runtime.processes import all_or_none, from_first_process
        from sapwood.saving.checkpoints import Checkpoints

        old = read_config(self.directory)
        agree(self.name)
        newest = max(Checkpoints(self.directory / "checkpoints").candidates(), default=None)
        if newest is not None and not resume:
            raise CheckpointError(f"{self.directory} already holds a run (newest checkpoint: step {newest}); --resume "
                                  f"goes on with it, --run chooses another directory")  # fmt: skip
        if not resume and (self.directory / "model").exists():  # its checkpoints may have been removed
            raise CheckpointError(f"{self.directory} already holds a model; --run chooses another directory")
        if newest is not None and from_first_process(old is not None):
            all_or_none(lambda: self._hold(old or {}, resume) if jax.process_index() == 0 else None)
            return False
        all_or_none(lambda: self._write(self._config()) if jax.process_index() == 0 else None)
        return True

    def _config(self, features: dict[str, Any] | None = None) -> dict[str, Any]:
        from sapwood.train.record.run_directory import Run, new_id

        saved = Run.saved(self.directory)  # if only the config was lost, the run keeps its id
        features = dict(self.data[0].features) if features is None else features
        return {
            "recipe": self.name,
            "run": (saved and saved.info.get("run")) or new_id(),
            "options": _options(self.recipe),
            "features": {name: _written(feature) for name, feature in features.items()},
            "versions": {"sapwood": __version__, "jax": jax.__version__},
        }

    def _hold(self, config: dict[str, Any], resume: bool | str) -> None:
        differences = self.differences(config)
        if not same_recipe(config["recipe"], self.name):
            raise ConfigError(f"{self.directory} cannot go on as another run: {differences[0]}")
        if config["recipe"] != self.name and not differences:
            self._write({**config, "recipe": self.name})
        if differences and resume != "anyway":
            raise ConfigError(f"{self.directory} cannot go on as another run: {', '.join(differences)}; --resume "
                              "anyway goes on all the same")  # fmt: skip
        if differences:
            print(f"sapwood: {self.directory} goes on, although {', '.join(differences)}", file=sys.stderr)
            self._write({**config, **self._config(self._held(config))})

    def _held(self, config: dict[str, Any]) -> dict[str, Any]:
        """The features of the training data, matched with those of the run so far: its classes, in its order."""
        from sapwood.data.feature import Feature
        from sapwood.train.evaluation import as_dataset

        data, learned = self.data[0], {name: Feature.from_json(said) for name, said in config["features"].items()}
        tokens = {name for name, feature in data.features.items() if feature.vocabulary is not None}  # not saved
        return as_dataset(data, {n: f for n, f in learned.items() if n not in tokens}, "data to train on").features

    def _write(self, config: dict[str, Any]) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            checksummed_json.write(self.directory / "config.json", config)
        except OSError as error:
            raise ConfigError(f"the run directory {self.directory} cannot be written: {error.strerror}; choose another "
                              f"with --run, or make room") from error  # fmt: skip

    def differences(self, config: dict[str, Any]) -> list[str]:
        """The differences in recipe and hyper-parameters between a run's config and this experiment, as messages."""
        if not same_recipe(config["recipe"], self.name):
            return [f"it is of the recipe {config['recipe']}, not of {self.name}"]
        old, new = config["options"], _plain(_options(self.recipe))
        pairs = [(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in {**old, **new}]
        # NaN is not equal to itself, but has the same repr.
        return [f"{name} was {x} and is now {y}" for name, x, y in pairs if x != y and repr(x) != repr(y)]

    def train(self, resume: bool | str = False, **options: Any) -> Any:
        """Train to the end of the run.

        Errors of the data and the mesh are raised before anything is written.

        Args:
            resume: continue from the newest intact checkpoint; see `begin`.
            options: options of `fit`, such as ``best`` and ``checkpoint_every``.

        Returns:
            The last state, or the best one with ``best``.

        Raises:
            CheckpointError: another process writes to the directory.
            KeyboardInterrupt: Ctrl-C stopped the run; its state is saved.
            SystemExit: SIGTERM stopped the run (exit code 143); its state is saved.
        """
        with self.writer:
            return self._train(resume, options)

    def _train(self, resume: bool | str, options: dict[str, Any]) -> Any:
        data, held_out = self.train_data
        recipe, trainer = self.recipe, self.trainer
        trainer.check_batch_size(self.batch_size)
        before = read_config(self.directory)
        written = self.begin(resume)
        try:
            result = trainer.fit(
                data,
                epochs=recipe.epochs,
                batch_size=self.batch_size,
                validation=held_out,
                seed=recipe.seed,
                run=self.writer,
                resume=resume,
                callbacks=recipe.callbacks(),
                **options,
            )
        except Exception:
            if not written and before is not None and jax.process_index() == 0 and resume == "anyway":
                self._write(before)  # the run did not continue
            begun = any((self.directory / name).exists() for name in ("metrics.jsonl", "checkpoints"))
            if written and jax.process_index() == 0 and not begun:
                (self.directory / "config.json").unlink(missing_ok=True)  # it failed before it began: this is no run
            raise
        if result.stopped == "Ctrl-C":
            raise KeyboardInterrupt  # the state is saved
        if result.stopped is not None:
            raise SystemExit(143)
        return result.state

    @cached_property
    def features(self) -> dict[str, Any]:
        """The features of the run's examples, read from its config. The data is not needed.

        Raises `CheckpointError` if the config is missing or damaged.
        """
        from sapwood.core.errors import DataError
        from sapwood.data.learned_features import Learned

        config = read_config(self.directory)
        if config is None:
            raise CheckpointError(f"{self.directory} is no run any more: its config.json was removed")
        try:
            return dict(Learned.from_json(config["features"]))
        except DataError as error:
            raise CheckpointError(f"{self.directory}/config.json: {error}") from error

    def restore(self, step: int | str | None = None) -> Any:
        """The training state of a checkpoint, on the devices of this process.

        ``step`` is the number of a step, "best" or "last". None takes the best checkpoint if the run keeps one, else
        the last one. Warns if the model's code has changed since the checkpoint was written.
        """
        from sapwood.data.learned_features import Learned
        from sapwood.saving.checkpoints import Checkpoints
        from sapwood.train.record import run_identity
        from sapwood.train.state.plan import plan
        from sapwood.train.state.restore import restore_state

        rows = self.batch_size
        batch = {name: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype) for name, f in self.features.items()}
        checkpoints = Checkpoints(self.directory / "checkpoints")
        best = checkpoints.choose(step) if step in (None, "best") else None
        chosen = "best" if best is not None else step
        state, found = restore_state(checkpoints, plan(self.trainer, batch).shapes, chosen)
        if step is None and best is not None and found.step != (last := checkpoints.latest()):
            said = f"the best by {found.best}" if found.step == best else f"for step {best}, the best by {found.best}"
            print(f"sapwood: the checkpoint of step {found.step}, {said}; --step last is {last}", file=sys.stderr)
        if changed := run_identity.model_changes(found.info.get("identity"), self.trainer):
            warnings.warn(f"{self.directory} was trained by other code, and its numbers are those of the code as it is "
                          f"now: {', '.join(changed[:4])}", stacklevel=2)  # fmt: skip
        features = found.info.get("features")
        return state.replace(features=None if features is None else Learned.from_json(features))

    def test(self, state: Any) -> dict[str, float]:
        """Evaluate a state on the test data: metrics by name."""
        return self.trainer.evaluate(state, self.data[1])

    def save(self, state: Any) -> Path:
        """Write the artifact ``model/``: the weights that evaluation uses, the features and the classes.

        The model is saved by its name in a package or in its recipe file (`sapwood.saving.model_reference`). Returns
        the path of the artifact, which `sapwood.load` reads.
        """
        objective = self.trainer.objective
        target = (state.features or self.features).get(getattr(objective, "target", ""))
        from sapwood.saving.artifact import save

        return save(
            self.directory / "model",
            *self.trainer.eval_variables(state),
            model=None if type(self.recipe).model is Recipe.model else self.recipe.model,
            features=state.features,
            classes=target.classes if target else None,
            extra={"recipe": self.name, "options": _options(self.recipe), "step": int(state.step)},
        )


def same_recipe(was: str, now: str) -> bool:
    """Whether two names are the same recipe.

    Two paths of files with the same file name are, if the old file is gone or both files have the same content: the
    file was moved or copied.
    """
    old, new = Path(was), Path(now)
    if was == now or not was.endswith(".py") or old.name != new.name:
        return was == now
    return not old.is_file() or (new.is_file() and old.read_bytes() == new.read_bytes())


def read_config(directory: Path) -> dict[str, Any] | None:
    """The config of a run directory; None if there is none. Raises `CheckpointError` if it cannot be read."""
    path = directory / "config.json"
    try:
        config = checksummed_json.read(path, unsealed=True)  # Sapwood 0.1 wrote no checksum
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    kinds = {"recipe": str, "options": dict, "features": dict}
    if not all(isinstance(config.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{path} is not the config of a run of Sapwood")
    return config


def _check_types(directory: Path, recipe: type[Recipe], given: dict[str, Any]) -> None:
    """Raise `CheckpointError` for an option whose type differs from that of its field of the recipe."""
    try:
        hints = typing.get_type_hints(recipe)
    except NameError:  # a type that is imported only for type checkers
        return
    for name, value in given.items():
        kind = hints.get(name, Any)
        if not _is_of(kind, value):
            said = getattr(kind, "__name__", str(kind))
            raise CheckpointError(f"{directory}/config.json gives {name} as {value!r:.40}, and {said} is expected")


_ABSENT = "not there"


def _written(feature: Any) -> dict[str, Any]:
    """The metadata of a feature as JSON types, without its vocabulary, which the recipe has."""
    return dataclasses.replace(feature, vocabulary=None).to_json()


def _options(recipe: Recipe) -> dict[str, Any]:
    """The hyper-parameters of a recipe by name. Fields that it computes itself (``field(init=False)``) are omitted."""
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe) if field.init}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _from_json(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value has the type ``kind`` of a recipe's field. Types that recipes do not use accept any value."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return any(value == word and type(value) is type(word) for word in inner)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(part, value) for part in inner)
    if origin is tuple:
        parts = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1:] == (Ellipsis,) else inner
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, parts, value))
    if type(value) is int and not -(2**63) <= value < 2**63:
        return False
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, str, bool) else value is None if kind is type(None) else True
