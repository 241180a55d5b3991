"""`Recipe`: one experiment as a frozen dataclass; its fields are the hyper-parameters, its methods the parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.core.vars import Vars


@dataclass(frozen=True)
class Recipe:
    """An experiment: what to learn, from which data, how. A recipe file defines one subclass.

    Each field is a hyper-parameter and an option of the command line. A subclass gives ``data``, ``model`` and
    ``optimizer``; ``objective`` is supervised learning of "label" from "image" unless it says otherwise.

    >>> import sapwood as sw
    >>> class Mine(Recipe):
    ...     def model(self, v, image):
    ...         return sw.layers.Dense(10)(v.logits, image.reshape(len(image), -1))
    >>> Mine(epochs=3).objective().inputs
    ('image',)
    """

    epochs: int = 10
    batch_size: int = 32
    seed: int = 0
    policy: str = "float32"
    validation: float = 0.0

    def data(self) -> tuple[Any, Any]:
        """The data to train on, and the data the result is tested on."""
        raise ConfigError(f"the recipe {type(self).__name__} defines no data()")

    def model(self, v: Vars, *inputs: Any) -> Any:
        """The model: a function of variables and inputs."""
        raise ConfigError(f"the recipe {type(self).__name__} defines no model(v, ...)")

    def objective(self) -> Any:
        """What is minimised: ``objective(v, batch) -> (loss, metrics)``."""
        from sapwood.train.objectives.supervised import supervised

        return supervised(self.model)

    def optimizer(self, steps: int) -> Any:
        """The optax optimizer for a run of so many steps."""
        raise ConfigError(f"the recipe {type(self).__name__} defines no optimizer(steps)")

    def trainer(self, steps: int, **options: Any) -> Any:
        """How it is trained; ``options`` (mesh, rules, jit) come from where it runs, and win."""
        from sapwood.train.trainer import Trainer

        return Trainer(self.objective(), self.optimizer(steps), **{"policy": self._policy(), **options})

    def callbacks(self) -> Sequence[Any]:
        """What looks at the run after each row, see `sapwood.train.callbacks`: an `EarlyStopping`, say."""
        return ()

    def report(self, params: dict, state: dict) -> str | None:
        """What to print when the training is over."""

    def _policy(self) -> str | None:
        return None if self.policy == "float32" else self.policy
