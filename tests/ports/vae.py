"""A variational autoencoder of handwritten digits: eight numbers an image, from which new ones can be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapwood as sw
from sapwood import layers as L


def sampled(v, mean, log_var):
    """A draw around the mean in training, else the mean; what it says about the image is a loss."""
    v.loss("kl", 0.5 * jnp.mean(mean**2 + jnp.exp(log_var) - log_var - 1) * mean.shape[-1] / 64)
    return mean + jnp.exp(log_var / 2) * jax.random.normal(v.rng("noise"), mean.shape) if v.train else mean


def decode(v, z):
    return L.Dense(64)(v.pixels, jax.nn.relu(L.Dense(64)(v.hidden, z)))


def model(v, pixels):
    x = jax.nn.relu(L.Dense(64)(v.hidden, pixels))
    z = sampled(v.z, L.Dense(8)(v.mean, x), L.Dense(8)(v.log_var, x))
    return decode(v.decoder, z)


def main():
    pixels = load_digits().data / 16
    train, test = sw.data.load({"pixels": pixels}, validation=0.2)

    objective = sw.supervised(model, "sigmoid_cross_entropy", (), inputs="pixels", target="pixels")
    trainer = sw.Trainer(objective, optax.adam(3e-3))
    state, _ = trainer.fit(train, epochs=20, batch_size=64)
    figures = trainer.evaluate(state, test)
    noise = np.random.default_rng(0).normal(size=(500, 8))
    drawn, _ = sw.apply(decode, state.params["decoder"], {}, noise)
    return {
        "reconstruction": figures["loss"],
        "kl": figures["auxiliary_loss"],
        "drawn_like_real": abs((1 / (1 + np.exp(-drawn))).mean(0) - pixels.mean(0)).mean(),
    }


if __name__ == "__main__":
    print(main())
