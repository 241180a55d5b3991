"""imbalanced.py in Keras."""

import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main():
    x, digit = load_digits(return_X_y=True)
    data = train_test_split(x / 16, (digit == 8).astype("int32"), test_size=0.3, random_state=0)
    x_train, x_test, y_train, y_test = data

    model = keras.Sequential([layers.Dense(1)])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    recall = keras.metrics.Recall(thresholds=0.0, name="binary_recall")
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=[keras.metrics.AUC(from_logits=True), recall])
    share = y_train.mean()
    model.fit(x_train, y_train, epochs=10, class_weight={0: 0.5 / (1 - share), 1: 0.5 / share})
    return model.evaluate(x_test, y_test, return_dict=True)


if __name__ == "__main__":
    print(main())
