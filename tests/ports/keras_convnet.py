"""convnet.py in Keras."""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main():
    digits = load_digits()
    data = train_test_split(digits.images[..., None] / 16, digits.target, test_size=0.2, random_state=0)
    x_train, x_test, y_train, y_test = data

    model = keras.Sequential([keras.Input((8, 8, 1)), layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="constant")])
    for features in (16, 32):
        model.add(layers.Conv2D(features, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.ReLU())
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(10))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=6, batch_size=64)
    return {
        "accuracy": model.evaluate(x_test, y_test)[1],
        "accuracy_aside": model.evaluate(np.roll(x_test, 1, axis=2), y_test)[1],
    }


if __name__ == "__main__":
    print(main())
