"""`digits-mlp`: trains two dense layers on the handwritten digits. It is the smallest complete example."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

import sapwood as sw
from sapwood import layers as L


@dataclass(frozen=True)
class DigitsMLP(sw.Recipe):
    """Two dense layers on 1,797 handwritten digits.

    Args:
        hidden: units of the first layer.
        learning_rate: the first learning rate of a cosine decay.
    """

    hidden: int = 128
    learning_rate: float = 2e-3

    def data(self) -> tuple[Any, Any]:
        return sw.data.load("digits", "train"), sw.data.load("digits", "test")

    def model(self, v: sw.Vars, image: Any) -> Any:
        x = L.flatten(v.policy.cast(image.astype("float32") / 16))
        x = jax.nn.relu(L.Dense(self.hidden)(v.hidden, x))
        return L.Dense(10)(v.logits, x)

    def optimizer(self, steps: int) -> Any:
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps))
