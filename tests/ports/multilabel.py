"""Four properties of a handwritten digit at once: is it even, is it prime, is it above four, has it a loop?"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapwood as sw
from sapwood import layers as L

model = L.Sequential([L.Dense(64), jax.nn.relu, L.Dense(4)])


def main():
    x, digit = load_digits(return_X_y=True)
    properties = np.stack([digit % 2 == 0, np.isin(digit, [2, 3, 5, 7]), digit > 4, np.isin(digit, [0, 6, 8, 9])], 1)
    train, test = sw.data.load({"x": x / 16, "properties": properties}, validation=0.2)

    objective = sw.supervised(
        model, "sigmoid_cross_entropy", ["binary_f1", "subset_accuracy"], inputs="x", target="properties"
    )
    trainer = sw.Trainer(objective, optax.adam(3e-3))
    state, _ = trainer.fit(train, epochs=15)
    return trainer.evaluate(state, test)


if __name__ == "__main__":
    print(main())
