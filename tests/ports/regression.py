"""How far diabetes gets in a year, from ten measurements: a network that would overfit is stopped where it is best."""

import jax
import optax
from sklearn.datasets import load_diabetes

import sapwood as sw
from sapwood import layers as L
from sapwood.train import EarlyStopping

model = L.Sequential([L.Dense(64), jax.nn.relu, L.Dense(64), jax.nn.relu, L.Dense(1)])


def main():
    x, y = load_diabetes(return_X_y=True)
    mean, std = y.mean(), y.std()
    train, test = sw.data.load({"x": x / x.std(0), "y": (y[:, None] - mean) / std}, validation=0.25)

    objective = sw.supervised(model, "squared_error", ["r2", "mean_absolute_error"], inputs="x", target="y")
    trainer = sw.Trainer(objective, optax.adam(3e-3))
    stop = EarlyStopping("validation_loss", patience=5, restore=True)
    state, history = trainer.fit(train, epochs=100, validation=0.2, callbacks=[stop])
    figures = trainer.evaluate(state, test)
    return {"epochs": len(history), "r2": figures["r2"], "error": figures["mean_absolute_error"] * std}


if __name__ == "__main__":
    print(main())
