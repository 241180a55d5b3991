"""Keras on its JAX backend: functional models, `compile` and `fit` on NumPy arrays."""

import time

import jax
import keras
from keras import layers


class Fit:
    """The job of a compiled model. A round is a number of batches in one long `fit`, timed by a callback.

    Keras gets the batches in the same order as the other systems, and does not shuffle. The progress bar is off, since
    it costs more than the step of a small model.
    """

    def __init__(self, work, model, at_once):
        self.work, self.model, self.at_once = work, model, at_once
        self.inputs, self.target = work.batches.values()

    def losses(self, steps):
        pairs = zip(self.inputs[:steps], self.target[:steps], strict=True)
        return [float(self.model.train_on_batch(x, y, return_dict=True)["loss"]) for x, y in pairs]

    def rounds(self, channel, steps):
        at_once = self.at_once

        class Timer(keras.callbacks.Callback):
            done, begin = 0, 0.0

            def on_train_batch_begin(self, batch, logs=None):
                if self.done % steps == 0:
                    if self.done:
                        # `self.model` would bring the state home first, and leave nothing to wait for; Keras wraps
                        # dicts and lists in types of its own, which are no trees to JAX
                        jax.block_until_ready([list(part) for part in (self._model._jax_state or {}).values()])
                        channel.report(seconds={"step": (time.perf_counter() - self.begin) / steps})
                    channel.wait()
                    self.begin = time.perf_counter()
                self.done += at_once

        inputs, target = (a.reshape(-1, *a.shape[2:]) for a in (self.inputs, self.target))
        self.model.fit(
            inputs, target, batch_size=self.work.suite.batch_size, epochs=10**9, shuffle=False, verbose=0,
            callbacks=[Timer()],
        )  # fmt: skip


def train(work, model, optimizer, at_once=1):
    """The job of a model. `at_once` is `steps_per_execution`, recommended by Keras's documentation for small models."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], steps_per_execution=at_once)
    return Fit(work, model, at_once)


def adam(work):
    # Keras adds its epsilon before the bias correction (Kingma & Ba 2015, section 2): in the first ten steps it counts
    # ten to thirty times as much as the others' 1e-8.
    return keras.optimizers.Adam(work.config["rate"], epsilon=1e-9)


def fill(model, weights, prefix=""):
    """Set the weights of every layer. Its name is the path of a scope in the canonical tree, joined by "_"."""
    for name, value in weights.items():
        if any(isinstance(inner, dict) for inner in value.values()) and name != "attention":
            fill(model, value, f"{prefix}{name}_")
            continue
        layer = model.get_layer(prefix + name)
        if name == "attention":
            arrays = [value[part]["kernel"] for part in ("query", "key", "value", "out")]
        else:
            arrays = list(value.values())
        rest = layer.get_weights()[len(arrays) :]  # the running statistics of a batch norm
        layer.set_weights([*arrays, *rest])


def mlp(work):
    image = keras.Input((work.config["inputs"],))
    x = layers.Dense(work.config["hidden"], activation="relu", name="hidden")(image)
    model = keras.Model(image, layers.Dense(work.config["classes"], name="out")(x))
    fill(model, work.weights)
    return train(work, model, adam(work), at_once=32)


def conv(work):
    c = work.config

    def convolve(x, features, name, size=3, stride=1):
        if size > 1 and stride > 1:  # "same" pads on one side alone here
            x = layers.ZeroPadding2D(size // 2)(x)
        padding = "same" if stride == 1 else "valid"
        return layers.Conv2D(features, size, stride, padding, use_bias=False, name=name)(x)

    def norm(x, name):
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)

    image = keras.Input(work.data["image"].shape[1:])
    x = layers.ReLU()(norm(convolve(image, c["stages"][0], "stem"), "stem_norm"))
    for i in range(len(c["stages"]) * c["blocks"]):
        features = c["stages"][i // c["blocks"]]
        stride = 1 if features == x.shape[-1] else 2
        h = layers.ReLU()(norm(convolve(x, features, f"blocks_{i}_conv1", 3, stride), f"blocks_{i}_norm1"))
        h = norm(convolve(h, features, f"blocks_{i}_conv2"), f"blocks_{i}_norm2")
        if stride == 2:
            x = norm(convolve(x, features, f"blocks_{i}_project", 1, 2), f"blocks_{i}_project_norm")
        x = layers.ReLU()(layers.Add()([x, h]))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(c["classes"], name="head")(x))
    fill(model, work.weights)
    return train(work, model, keras.optimizers.SGD(c["rate"], momentum=0.9))


class Positions(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def gpt(work):
    c = work.config

    def norm(x, name):
        return layers.LayerNormalization(epsilon=1e-6, name=name)(x)

    def gelu(x):
        return keras.activations.gelu(x, approximate=True)

    tokens = keras.Input((c["tokens"],), dtype="int32")
    x = Positions(name="positions")(layers.Embedding(c["vocabulary"], c["width"], name="embed")(tokens))
    for i in range(c["layers"]):
        h = norm(x, f"blocks_{i}_norm1")
        at = layers.MultiHeadAttention(
            c["heads"], c["width"] // c["heads"], use_bias=False, name=f"blocks_{i}_attention"
        )
        x = layers.Add()([x, at(h, h, use_causal_mask=True)])
        h = layers.Dense(4 * c["width"], activation=gelu, name=f"blocks_{i}_up")(norm(x, f"blocks_{i}_norm2"))
        x = layers.Add()([x, layers.Dense(c["width"], name=f"blocks_{i}_down")(h)])
    model = keras.Model(tokens, layers.Dense(c["vocabulary"], use_bias=False, name="head")(norm(x, "norm")))
    fill(model, work.weights)
    return train(work, model, adam(work))
