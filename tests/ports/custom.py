"""Between which bounds will diabetes be in a year? Own layer, own loss, own metric, own training step."""

import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes

import sapwood as sw
from sapwood import layers as L
from sapwood.train import Mean, Metric


class Radial(sw.Layer):
    """How near each of several centres is: `(..., inputs)` to `(..., features)`. Broomhead and Lowe 1988."""

    features: int

    def __call__(self, v, x):
        centres = v.param("centres", (self.features, x.shape[-1]), jax.nn.initializers.normal(1.0))
        width = v.param("width", (self.features,), jax.nn.initializers.ones)
        return jnp.exp(-width * jnp.mean((x[..., None, :] - centres) ** 2, -1))


def quantiles(outputs, target, levels=(0.1, 0.9)):
    """Small where a share of `levels` of the targets lies below each output. Koenker and Bassett 1978."""
    missed = target[:, None] - outputs
    return jnp.maximum(jnp.array(levels) * missed, (jnp.array(levels) - 1) * missed).sum(-1)


class Coverage(Metric):
    """The share of targets that lie between the bounds."""

    inside: jax.Array
    count: jax.Array

    def compute(self):
        return self.inside / self.count


def model(v, x):
    return L.Dense(2)(v.bounds, Radial(32)(v.near, x))


def objective(v, batch):
    bounds, y = model(v, batch["x"]), batch["y"]
    inside = (bounds[:, 0] < y) & (y < bounds[:, 1])
    return Mean.of(quantiles(bounds, y)), {"coverage": Coverage(inside.sum(), jnp.float32(len(y)))}


@functools.partial(jax.jit, static_argnums=0)
def step(trainer, state, batch):
    """Sharpness-aware: the gradient is that of the worst parameters nearby. Foret et al. 2021."""

    def loss(params):
        return sw.apply(objective, params, state.state, batch, train=True)[0][0].compute()

    gradient = jax.grad(loss)(state.params)
    reach = 0.05 / optax.tree.norm(gradient)
    worst = jax.tree.map(lambda p, g: p + reach * g, state.params, gradient)
    updates, opt_state = trainer.optimizer.update(jax.grad(loss)(worst), state.opt_state, state.params)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def main():
    x, y = load_diabetes(return_X_y=True)
    train, test = sw.data.load({"x": x / x.std(0), "y": (y - y.mean()) / y.std()}, validation=0.3)

    trainer = sw.Trainer(objective, optax.adam(3e-3))
    state = trainer.init(0, train.gather([0]))
    for batch in sw.data.batches(train, 32, epochs=30):
        state = step(trainer, state, batch)
    return trainer.evaluate(state, test)


if __name__ == "__main__":
    print(main())
