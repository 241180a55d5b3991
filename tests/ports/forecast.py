"""The next value of a chaotic series from the last twenty, by a gated recurrent unit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sapwood as sw
from sapwood import layers as L


def mackey_glass(length, delay=17):
    """Mackey and Glass 1977, a standard series of forecasting."""
    x = [1.2] * (delay + 1)
    for _ in range(length):
        x.append(x[-1] + 0.2 * x[-1 - delay] / (1 + x[-1 - delay] ** 10) - 0.1 * x[-1])
    return np.array(x[delay + 1 :: 3], "float32")


class GRU(sw.Layer):
    """The last state of a gated recurrent unit: `(batch, length, inputs)` to `(batch, features)`."""

    features: int

    def __call__(self, v, x):
        def step(h, x):
            gates = jax.nn.sigmoid(L.Dense(2 * self.features)(v.gates, jnp.concatenate([x, h], -1)))
            update, reset = jnp.split(gates, 2, -1)
            new = jnp.tanh(L.Dense(self.features)(v.new, jnp.concatenate([x, reset * h], -1)))
            return update * h + (1 - update) * new, None

        h = jnp.zeros((len(x), self.features))
        return jax.lax.scan(step, h, jnp.swapaxes(x, 0, 1))[0]


def model(v, x):
    return L.Dense(1)(v.out, GRU(16)(v.gru, x[..., None]))[:, 0]


def main():
    windows = np.lib.stride_tricks.sliding_window_view(mackey_glass(6000), 21)
    windows = (windows - windows.mean()) / windows.std()
    past, future = windows[:, :-1], windows[:, -1]
    train, test = {"x": past[:1500], "y": future[:1500]}, {"x": past[1500:], "y": future[1500:]}

    objective = sw.supervised(model, "squared_error", ["root_mean_squared_error"], inputs="x", target="y")
    trainer = sw.Trainer(objective, optax.adam(1e-2))
    state, _ = trainer.fit(train, epochs=10, batch_size=64)
    same = np.sqrt(np.mean((test["y"] - test["x"][:, -1]) ** 2))  # of the forecast that nothing changes
    return {"error": trainer.evaluate(state, test)["root_mean_squared_error"] / same}


if __name__ == "__main__":
    print(main())
