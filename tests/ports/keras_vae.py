"""vae.py in Keras."""

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Sampled(layers.Layer):
    """A draw around the mean in training, else the mean; what it says about the image is a loss."""

    def __init__(self):
        super().__init__()
        self.noise = keras.random.SeedGenerator(0)

    def call(self, mean, log_var, training=False):
        self.add_loss(0.5 * ops.mean(mean**2 + ops.exp(log_var) - log_var - 1) * mean.shape[-1] / 64)
        if not training:
            return mean
        return mean + ops.exp(log_var / 2) * keras.random.normal(ops.shape(mean), seed=self.noise)


def main():
    pixels = load_digits().data / 16
    train, test = train_test_split(pixels, test_size=0.2, random_state=0)

    image = keras.Input((64,))
    x = layers.Dense(64, "relu")(image)
    z = Sampled()(layers.Dense(8)(x), layers.Dense(8)(x))
    decoder = keras.Sequential([keras.Input((8,)), layers.Dense(64, "relu"), layers.Dense(64)])
    model = keras.Model(image, decoder(z))

    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=[keras.metrics.BinaryCrossentropy(from_logits=True)])
    model.fit(train, train, epochs=20, batch_size=64)
    figures = model.evaluate(test, test, return_dict=True)
    drawn = decoder.predict(np.random.default_rng(0).normal(size=(500, 8)))
    return {
        "reconstruction": figures["binary_crossentropy"],
        "kl": figures["loss"] - figures["binary_crossentropy"],
        "drawn_like_real": abs((1 / (1 + np.exp(-drawn))).mean(0) - pixels.mean(0)).mean(),
    }


if __name__ == "__main__":
    print(main())
