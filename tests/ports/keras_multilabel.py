"""multilabel.py in Keras."""

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def subset_accuracy(y_true, y_pred):
    return ops.all((y_pred > 0.5) == (y_true > 0.5), axis=-1)


def main():
    x, digit = load_digits(return_X_y=True)
    properties = np.stack([digit % 2 == 0, np.isin(digit, [2, 3, 5, 7]), digit > 4, np.isin(digit, [0, 6, 8, 9])], 1)
    data = train_test_split(x / 16, properties.astype("float32"), test_size=0.2, random_state=0)
    x_train, x_test, y_train, y_test = data

    model = keras.Sequential([layers.Dense(64, "relu"), layers.Dense(4, "sigmoid")])
    f1 = keras.metrics.F1Score("macro", threshold=0.5, name="binary_f1")
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=[f1, subset_accuracy])
    model.fit(x_train, y_train, epochs=15)
    return model.evaluate(x_test, y_test, return_dict=True)


if __name__ == "__main__":
    print(main())
