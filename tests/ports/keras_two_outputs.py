"""two_outputs.py in Keras."""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split


def main():
    x, benign = load_breast_cancer(return_X_y=True)
    x = np.log(x + 0.01)
    x = (x - x.mean(0)) / x.std(0)  # ten means, ten errors, ten worst values
    x_train, x_test, benign_train, benign_test = train_test_split(x, benign, test_size=0.2, random_state=0)

    mean, worst = keras.Input((10,), name="mean"), keras.Input((10,), name="worst")
    both = layers.concatenate([layers.Dense(16, "relu")(mean), layers.Dense(16, "relu")(worst)])
    both = layers.Dense(16, "relu")(both)
    outputs = {"benign": layers.Dense(1, name="benign")(both), "area_error": layers.Dense(1, name="area_error")(both)}
    model = keras.Model([mean, worst], outputs)
    model.compile(
        keras.optimizers.Adam(3e-3),
        loss={"benign": keras.losses.BinaryCrossentropy(from_logits=True), "area_error": "mse"},
        loss_weights={"benign": 1.0, "area_error": 0.5},
        metrics={"benign": keras.metrics.BinaryAccuracy(threshold=0.0), "area_error": keras.metrics.R2Score()},
    )

    def split(x, benign):
        return {"mean": x[:, :10], "worst": x[:, 20:]}, {"benign": benign[:, None], "area_error": x[:, 13:14]}

    model.fit(*split(x_train, benign_train), epochs=20)
    figures = model.evaluate(*split(x_test, benign_test), return_dict=True)
    return {
        "benign_accuracy": figures["benign_binary_accuracy"],
        "area_error_r2": figures["area_error_r2_score"],
    }


if __name__ == "__main__":
    print(main())
