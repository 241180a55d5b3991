"""The recipe `digits` written in Keras on its JAX backend: same layers, split, optimizer, epochs and batch size.

    python benchmarks/digits_keras.py --seed 0

Prints ``test accuracy <x>``. `benchmarks/digits_race.py` times this script against the recipe.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--dropout", type=float, default=0.5)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--batch-size", type=int, default=32)
options = parser.parse_args()

keras.utils.set_random_seed(options.seed)
images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
train, test, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.2, stratify=labels, random_state=0
)

model = keras.Sequential([keras.Input((8, 8, 1))])
for width in (options.width, 2 * options.width):
    model.add(keras.layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer="lecun_normal"))
    model.add(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5))
    model.add(keras.layers.ReLU())
    model.add(keras.layers.MaxPooling2D(2))
model.add(keras.layers.Flatten())
model.add(keras.layers.Dropout(options.dropout))
model.add(keras.layers.Dense(10, kernel_initializer="lecun_normal"))

steps = options.epochs * -(-len(train) // options.batch_size)
model.compile(
    optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(train, train_labels, batch_size=options.batch_size, epochs=options.epochs, verbose=2)
loss, accuracy = model.evaluate(test, test_labels, verbose=0)
print(f"test accuracy {accuracy:.4f}")
