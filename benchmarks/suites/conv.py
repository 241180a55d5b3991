"""`conv`: ResNet-20 on 32x32 images with batch norm, batch 32, SGD with momentum.

He et al. 2016, "Deep Residual Learning" (arXiv:1512.03385), section 4.2: three stages of three blocks, of 16, 32 and 64
channels. Where a stage halves the image, the shortcut is a 1x1 convolution with its norm (their option B).
"""

import numpy as np

from benchmarks.suite import PEERS, Goal, Suite, beats

CONFIG = {"stages": (16, 32, 64), "blocks": 3, "classes": 10, "rate": 0.01}


def weights(rng, config):
    def conv(size, inputs, outputs):
        kernel = rng.standard_normal((size, size, inputs, outputs)) * np.sqrt(2 / (size * size * inputs))
        return {"kernel": kernel.astype("float32")}

    def norm(features):
        return {"scale": np.ones(features, "float32"), "bias": np.zeros(features, "float32")}

    stages = config["stages"]
    tree = {"stem": conv(3, 3, stages[0]), "stem_norm": norm(stages[0]), "blocks": {}}
    inputs = stages[0]
    for features in stages:
        for _ in range(config["blocks"]):
            block = {"conv1": conv(3, inputs, features), "norm1": norm(features)}
            block |= {"conv2": conv(3, features, features), "norm2": norm(features)}
            if inputs != features:
                block |= {"project": conv(1, inputs, features), "project_norm": norm(features)}
            tree["blocks"][str(len(tree["blocks"]))] = block
            inputs = features
    kernel = rng.standard_normal((inputs, config["classes"])) / np.sqrt(inputs)
    tree["head"] = {"kernel": kernel.astype("float32"), "bias": np.zeros(config["classes"], "float32")}
    return tree


def data(rng, config):
    label = rng.integers(0, config["classes"], 32 * 64, dtype="int32")
    centres = rng.standard_normal((config["classes"], 32, 32, 3), dtype="float32")
    image = centres[label] + rng.standard_normal((len(label), 32, 32, 3), dtype="float32")
    return {"image": image, "label": label}


SUITES = (
    Suite(
        "conv",
        "a training step of ResNet-20 on 32x32x3, batch 32, SGD with momentum",
        model="conv",
        config=CONFIG,
        weights=weights,
        data=data,
        epoch=64,
        steps=8,
        goals=(Goal("sapwood", "floor", 1.02), *beats("sapwood", *PEERS)),
    ),
)
