"""`Recipe`: one experiment as a frozen dataclass of hyper-parameters, whose methods make its parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.core.vars import Vars


@dataclass(frozen=True)
class Recipe:
    """An experiment: what to learn, from which data, how. A recipe file defines one subclass.

    Each field is a hyper-parameter and an option of the command line. A subclass defines ``data``, ``model`` and
    ``optimizer``. The default ``objective`` is supervised learning of "label" from "image".

    Args:
        epochs: passes over the training data.
        batch_size: examples in a global batch.
        seed: seed of the initial parameters, the order of the data, every random draw and the validation split.
        policy: the dtype that layers compute in, such as "bfloat16". With "float32" layers cast nothing, and dtypes
            follow JAX's promotion.
        validation: the fraction of the training data that is held out for validation; 0 for none.

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
        """The training data and the test data. A subclass must define it."""
        raise ConfigError(f"the recipe {type(self).__name__} defines no data()")

    def model(self, v: Vars, *inputs: Any) -> Any:
        """The model: a function of the variables and the inputs. A subclass must define it."""
        raise ConfigError(f"the recipe {type(self).__name__} defines no model(v, ...)")

    def objective(self) -> Any:
        """The objective to minimize: ``objective(v, batch) -> (loss, metrics)``."""
        from sapwood.train.objectives.supervised import supervised

        return supervised(self.model)

    def optimizer(self, steps: int) -> Any:
        """The optax optimizer for a run of ``steps`` steps. A subclass must define it."""
        raise ConfigError(f"the recipe {type(self).__name__} defines no optimizer(steps)")

    def trainer(self, steps: int, **options: Any) -> Any:
        """The trainer for a run of ``steps`` steps.

        ``options`` are arguments of `Trainer` that depend on the machine, such as mesh, rules and jit. An argument in
        ``options`` replaces the one that the recipe sets.
        """
        from sapwood.train.trainer import Trainer

        return Trainer(self.objective(), self.optimizer(steps), **{"policy": self._policy(), **options})

    def callbacks(self) -> Sequence[Any]:
        """Callbacks to call after each row of metrics, such as `EarlyStopping`; see `sapwood.train.callbacks`."""
        return ()

    def report(self, params: dict[str, Any], state: dict[str, Any]) -> str | None:
        """A text to print when training is over; None prints nothing."""

    def _policy(self) -> str | None:
        return None if self.policy == "float32" else self.policy
