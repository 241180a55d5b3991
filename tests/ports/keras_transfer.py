"""transfer.py in Keras."""

import tempfile

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits


def compiled(model, rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def main():
    digits = load_digits()
    images, labels = digits.images[..., None] / 16, digits.target
    known, few = labels < 5, np.concatenate([np.flatnonzero(labels == c)[:10] for c in range(5, 10)])
    rest = np.setdiff1d(np.flatnonzero(~known), few)

    trunk = keras.Sequential([keras.Input((8, 8, 1))])
    for features in (8, 16):
        trunk.add(layers.Conv2D(features, 3, padding="same", activation="relu"))
        trunk.add(layers.MaxPooling2D(2))
    trunk.add(layers.Flatten())
    old = compiled(keras.Sequential([trunk, layers.Dense(5)]), 3e-3)
    old.fit(images[known], labels[known], epochs=5)
    trunk.save(path := tempfile.mkdtemp() + "/trunk.keras")

    kept = keras.models.load_model(path)
    kept.trainable = False
    new = compiled(keras.Sequential([kept, layers.Dense(5)]), 1e-2)
    new.fit(images[few], labels[few] - 5, epochs=30)
    moved = [np.ptp(a - b) for a, b in zip(trunk.get_weights(), kept.get_weights(), strict=True)]
    return {
        "accuracy": new.evaluate(images[rest], labels[rest] - 5)[1],
        "trunk_moved": max(moved),
    }


if __name__ == "__main__":
    print(main())
