"""`digits`: trains a small convolutional network on 1,797 real handwritten digits of 8 x 8 pixels."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

import sapwood as sw
from sapwood import layers as L


@dataclass(frozen=True)
class Digits(sw.Recipe):
    """A small convolutional network on 1,797 handwritten digits.

    Args:
        epochs: passes over the training data.
        width: channels of the first block; the second block has twice as many.
        dropout: the dropout rate before the last layer.
        learning_rate: the first learning rate of a cosine decay.
    """

    epochs: int = 15
    width: int = 32
    dropout: float = 0.5
    learning_rate: float = 3e-3

    def data(self) -> tuple[Any, Any]:
        return sw.data.load("digits", "train"), sw.data.load("digits", "test")

    def model(self, v: sw.Vars, image: Any) -> Any:
        x = v.policy.cast(image.astype("float32") / 16)  # pixels are integers from 0 to 16
        x = self.block(v.blocks[0], x, self.width)
        x = self.block(v.blocks[1], x, 2 * self.width)
        x = L.Dropout(self.dropout)(v.drop, L.flatten(x))
        return L.Dense(10)(v.logits, x)

    def block(self, v: sw.Vars, x: Any, width: int) -> Any:
        x = L.Conv(width, (3, 3), bias=False)(v.conv, x)
        x = jax.nn.relu(L.BatchNorm()(v.norm, x))
        return L.MaxPool((2, 2))(v.pool, x)

    def optimizer(self, steps: int) -> Any:
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps))
