"""`Experiment`: a recipe in a run directory, trained, resumed, evaluated and read back.

A run directory holds ``config.json`` (the recipe and its options), ``metrics.jsonl``, ``tensorboard/``,
``checkpoints/``, ``curves.png`` and, when the run is over, ``model/``: the artifact that `sapwood.load` reads.
"""

import dataclasses
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

import sapwood as sw
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.recipes.recipe import Recipe
from sapwood.recipes.registry import find


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A recipe and the directory of its run; ``options`` say where it runs (mesh, rules, jit)."""

    name: str
    recipe: Recipe
    directory: Path
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | os.PathLike, options: dict[str, Any] | None = None) -> "Experiment":
        """The experiment of a run directory. Raises `CheckpointError` where there is none."""
        directory = Path(directory)
        try:
            config = json.loads((directory / "config.json").read_text())
        except FileNotFoundError:
            known = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/config.json"))[-3:])
            hint = f" (runs here: {known})" if known else ""
            raise CheckpointError(f"{directory} is no run: it has no config.json{hint}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}/config.json cannot be read: {error}") from None
        return cls(config["recipe"], find(config["recipe"])(**_from_json(config["options"])), directory, options or {})

    @cached_property
    def data(self) -> tuple[Any, Any]:
        """The recipe's data: to train on, and to test on."""
        return self.recipe.data()

    @cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        from sapwood.data.batches import batches

        return self.recipe.epochs * batches(self.train_data[0], self.recipe.batch_size).steps_per_epoch

    @cached_property
    def train_data(self) -> tuple[Any, Any]:
        """What is trained on, and what is held out of it for validation (None for nothing)."""
        if not self.recipe.validation:
            return self.data[0], None
        return self.data[0].split(self.recipe.validation, seed=self.recipe.seed)

    @cached_property
    def trainer(self) -> Any:
        """The recipe's trainer, where it runs."""
        return self.recipe.trainer(self.steps, **self.options)

    def begin(self, resume: bool) -> None:
        """Write the config, or hold a run that goes on to its own."""
        path = self.directory / "config.json"
        config = {
            "recipe": self.name,
            "options": dataclasses.asdict(self.recipe),
            "features": {name: _written(feature) for name, feature in self.data[0].features.items()},
            "versions": {"sapwood": sw.__version__, "jax": jax.__version__},
        }
        if resume and path.exists():
            old = json.loads(path.read_text())
            changed = {
                name: (value, config["options"].get(name))
                for name, value in [("recipe", old["recipe"]), *old["options"].items()]
                if name != "recipe" and value != _plain(config["options"].get(name))
            }
            if old["recipe"] != self.name:
                raise ConfigError(f"{self.directory} is a run of the recipe {old['recipe']}, not of {self.name}")
            if changed:
                said = ", ".join(f"{name} was {a} and is now {b}" for name, (a, b) in changed.items())
                raise ConfigError(f"{self.directory} cannot go on with other hyper-parameters: {said}")
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        part = path.with_name("config.json.part")
        part.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(part, path)  # whole or not at all, also when killed

    def train(self, resume: bool = False, **options: Any) -> Any:
        """Train to the end; returns the last state."""
        self.begin(resume)
        data, held_out = self.train_data
        recipe = self.recipe
        state, _ = self.trainer.fit(
            data,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            validation=held_out,
            seed=recipe.seed,
            run=self.directory,
            resume=resume,
            **options,
        )
        return state

    @cached_property
    def features(self) -> dict[str, Any]:
        """What the entries of the run's examples are, as `begin` wrote it down; the data itself is not needed."""
        from sapwood.data.features import Feature

        written = json.loads((self.directory / "config.json").read_text())["features"]
        return {name: Feature(**_from_json(feature)) for name, feature in written.items()}

    def restore(self) -> Any:
        """The state of the newest whole checkpoint, on the devices of this process."""
        from sapwood.train.birth import plan
        from sapwood.train.checkpoints import Checkpoints

        rows = self.recipe.batch_size
        batch = {name: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype) for name, f in self.features.items()}
        state, _ = Checkpoints(self.directory / "checkpoints").restore(plan(self.trainer, batch).shapes)
        return state

    def test(self, state: Any) -> dict[str, float]:
        """The metrics of a state on the test data."""
        return self.trainer.evaluate(state, self.data[1])


def _written(feature: Any) -> dict[str, Any]:
    """A feature's metadata without its vocabulary, which the recipe has."""
    return {name: value for name, value in dataclasses.asdict(feature).items() if name != "vocabulary"}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _from_json(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
