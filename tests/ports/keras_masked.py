"""masked.py in Keras."""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits


def block(x, shown):
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(4, 4)(h, h, attention_mask=layers.Reshape((1, 5))(shown))
    h = layers.Dense(32, "gelu")(layers.LayerNormalization()(x))
    return x + layers.Dense(16)(h)


def rows(x, digit, count, seed):
    """Five images each, of which one to five are shown, and the largest digit of those."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(x), size=(count, 5))
    shown = np.arange(5) < rng.integers(1, 6, size=(count, 1))
    return {"images": x[chosen], "shown": shown}, np.where(shown, digit[chosen], 0).max(1)


def main():
    x, digit = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, digit = x[order] / 16, digit[order]
    train, test = rows(x[:1400], digit[:1400], 3000, seed=0), rows(x[1400:], digit[1400:], 500, seed=1)

    images, shown = keras.Input((5, 64), name="images"), keras.Input((5,), dtype="bool", name="shown")
    x = block(layers.Dense(16)(images), shown)
    logits = layers.Dense(10)(layers.LayerNormalization()(x)[:, 0])  # the first image is always shown
    model = keras.Model([images, shown], logits)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    model.fit(*train, epochs=6, batch_size=64)
    return model.evaluate(*test, return_dict=True)


if __name__ == "__main__":
    print(main())
