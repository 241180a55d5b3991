"""forecast.py in Keras."""

import keras
import numpy as np
from keras import layers


def mackey_glass(length, delay=17):
    """Mackey and Glass 1977, a standard series of forecasting."""
    x = [1.2] * (delay + 1)
    for _ in range(length):
        x.append(x[-1] + 0.2 * x[-1 - delay] / (1 + x[-1 - delay] ** 10) - 0.1 * x[-1])
    return np.array(x[delay + 1 :: 3], "float32")


def main():
    windows = np.lib.stride_tricks.sliding_window_view(mackey_glass(6000), 21)
    windows = (windows - windows.mean()) / windows.std()
    past, future = windows[:, :-1, None], windows[:, -1:]

    model = keras.Sequential([layers.GRU(16), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=[keras.metrics.RootMeanSquaredError()])
    model.fit(past[:1500], future[:1500], epochs=10, batch_size=64)
    same = np.sqrt(np.mean((future[1500:] - past[1500:, -1]) ** 2))  # of the forecast that nothing changes
    return {"error": model.evaluate(past[1500:], future[1500:])[1] / same}


if __name__ == "__main__":
    print(main())
