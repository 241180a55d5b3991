"""A convolutional network on handwritten digits that need not stand in the middle: images move while it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapwood as sw
from sapwood import layers as L


def moved(v, image):
    """Each image moved by up to a pixel along both axes; only in training."""
    if not v.train:
        return image
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(v.rng("corners"), (len(image), 2), 0, 3)
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), image.shape[1:]))(padded, corners)


def model(v, image):
    x = moved(v.moved, image)
    for i, features in enumerate((16, 32)):
        x = L.Conv(features, (3, 3), bias=False)(v.conv[i], x)
        x = jax.nn.relu(L.BatchNorm()(v.norm[i], x))
        x = L.max_pool(x, (2, 2))
    return L.Dense(10)(v.logits, L.flatten(x))


def main():
    digits = load_digits()
    train, test = sw.data.load((digits.images[..., None] / 16, digits.target), validation=0.2)
    aside = test.map(lambda example: {**example, "image": np.roll(example["image"], 1, axis=1)})

    trainer = sw.Trainer(sw.supervised(model), optax.adam(3e-3))
    state, _ = trainer.fit(train, epochs=6, batch_size=64)
    return {
        "accuracy": trainer.evaluate(state, test)["accuracy"],
        "accuracy_aside": trainer.evaluate(state, aside)["accuracy"],
    }


if __name__ == "__main__":
    print(main())
