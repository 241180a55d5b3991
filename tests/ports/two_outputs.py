"""Two tables about the same tumours, and two questions about each: is it benign, and how uncertain is its area?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import sapwood as sw
from sapwood import layers as L
from sapwood import losses, metrics


def model(v, mean, worst):
    x = jnp.concatenate([jax.nn.relu(L.Dense(16)(v.mean, mean)), jax.nn.relu(L.Dense(16)(v.worst, worst))], -1)
    x = jax.nn.relu(L.Dense(16)(v.both, x))
    return L.Dense(1)(v.benign, x)[:, 0], L.Dense(1)(v.area_error, x)[:, 0]


def objective(v, batch):
    benign, area_error = model(v, batch["mean"], batch["worst"])
    first = losses.sigmoid_cross_entropy(benign, batch["benign"])
    second = losses.squared_error(area_error, batch["area_error"])
    return metrics.Mean.of(first + 0.5 * second), {
        "benign_accuracy": metrics.binary_accuracy(benign, batch["benign"]),
        "area_error_r2": metrics.r2(area_error, batch["area_error"]),
    }


def main():
    x, benign = load_breast_cancer(return_X_y=True)
    x = np.log(x + 0.01)
    x = (x - x.mean(0)) / x.std(0)  # ten means, ten errors, ten worst values
    data = {"mean": x[:, :10], "worst": x[:, 20:], "benign": benign, "area_error": x[:, 13]}
    train, test = sw.data.load(data, validation=0.2)

    trainer = sw.Trainer(objective, optax.adam(3e-3))
    state, _ = trainer.fit(train, epochs=20)
    return trainer.evaluate(state, test)


if __name__ == "__main__":
    print(main())
