"""regression.py in Keras."""

import keras
from keras import layers
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split


def main():
    x, y = load_diabetes(return_X_y=True)
    mean, std = y.mean(), y.std()
    data = train_test_split(x / x.std(0), (y - mean) / std, test_size=0.25, random_state=0)
    x_train, x_test, y_train, y_test = data

    model = keras.Sequential([layers.Dense(64, "relu"), layers.Dense(64, "relu"), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(3e-3), "mse", metrics=[keras.metrics.R2Score(), "mae"])
    stop = keras.callbacks.EarlyStopping("val_loss", patience=5, restore_best_weights=True)
    history = model.fit(x_train, y_train[:, None], epochs=100, validation_split=0.2, callbacks=[stop])
    _, r2, error = model.evaluate(x_test, y_test[:, None])
    return {"epochs": len(history.epoch), "r2": r2, "error": error * std}


if __name__ == "__main__":
    print(main())
