"""`mlp`: 784-128-10 with ReLU, batch 32, Adam. The step is so short that dispatch costs more than computing."""

import numpy as np

from benchmarks.suite import PEERS, Goal, Suite, beats

CONFIG = {"inputs": 784, "hidden": 128, "classes": 10, "rate": 1e-3}
EPOCH = 1024


def weights(rng, config):
    def dense(inputs, outputs):
        kernel = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        return {"kernel": kernel.astype("float32"), "bias": np.zeros(outputs, "float32")}

    return {
        "hidden": dense(config["inputs"], config["hidden"]),
        "out": dense(config["hidden"], config["classes"]),
    }


def data(rng, config):
    """Random points around one center for each class, so the classes can be learned."""
    label = rng.integers(0, config["classes"], 32 * EPOCH, dtype="int32")
    centres = rng.standard_normal((config["classes"], config["inputs"]), dtype="float32")
    image = centres[label] + 3 * rng.standard_normal((len(label), config["inputs"]), dtype="float32")
    return {"image": image, "label": label}


SUITES = (
    Suite(
        "mlp",
        "a training step of 784-128-10, batch 32, Adam",
        model="mlp",
        config=CONFIG,
        weights=weights,
        data=data,
        epoch=EPOCH,
        steps=4 * EPOCH,
        goals=(Goal("sapwood", "floor", 0.6), *beats("sapwood", *PEERS)),
    ),
)
