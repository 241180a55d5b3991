"""``sapwood predict RUN FILES...``: prints the class and its probability for image files, by the model of a run.

The probability is the softmax of the model's outputs, so the loss must be one of `SOFTMAX`, or one that is not
Sapwood's. The run must be an image classifier: one input of shape (height, width, channels), and one output per class.
"""

import functools
import os
from typing import Any

import numpy as np

from sapwood.command import options
from sapwood.core.errors import CheckpointError, ConfigError

SOFTMAX = ("softmax_cross_entropy", "kl_divergence")
"""The losses for which the softmax of the model's outputs gives class probabilities."""


def main(arguments: list[str]) -> None:
    """Print file, class and probability on one line per file, in the order of the arguments."""
    parser = options.Parser("predict", "class and probability of image files, by a run's best checkpoint, or its last")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("files", nargs="+", help="image files; resized, and made grey where the model wants that")
    parser.add_argument(
        "--invert", action="store_true", help="for dark on light, where the model learned light on dark"
    )
    options.add_step(parser)
    options.add_trust(parser)
    options.add_machine(parser)
    found = parser.read(arguments)
    from sapwood.experiment.experiment import Experiment

    experiment = Experiment.open(found.run, options.machine(found), found.trust)
    objective = experiment.trainer.objective
    names = getattr(objective, "inputs", ())
    if len(names) == 1 and names[0] not in experiment.features:
        raise CheckpointError(f"{found.run}/config.json says nothing of {names[0]}, which its model takes")
    if len(names) != 1 or len(experiment.features[names[0]].shape) != 3:
        takes = ", ".join(names) or "what only its objective knows"
        raise ConfigError(f"{found.run} is no image classifier: its model takes {takes}")
    check_loss(found.run, objective)
    state = experiment.restore(found.step)
    features = {**experiment.features, **(state.features or {})}  # the checkpoint's override the config's
    feature = features[names[0]]
    low, high = limits(names[0], feature)
    images = np.stack([read(file, feature, low, high, invert=found.invert) for file in found.files])
    logits = experiment.trainer.predict(state, {names[0]: images})
    shape = np.shape(logits)[1:]
    if len(shape) != 1 or shape[0] < 2:
        raise ConfigError(
            f"{found.run} is no image classifier: its model gives an output of shape {shape} for an image; one number "
            "for each of at least two classes is expected. Trainer.predict gives the outputs as they are"
        )
    target = features.get(getattr(objective, "target", ""))
    classes = (target.classes if target else None) or ()
    for file, row in zip(found.files, logits.astype(np.float64), strict=True):
        odds = np.exp(row - row.max())
        best = int(row.argmax())
        name = classes[best] if best < len(classes) else best  # a model may have more outputs than class names
        print(f"{file}\t{name}\t{odds[best] / odds.sum():.4f}")


def check_loss(run: str, objective: Any) -> None:
    """Raise `ConfigError` for a loss of Sapwood that is not one of `SOFTMAX`. Losses from elsewhere are accepted."""
    from sapwood.losses.registry import LOSSES

    loss = getattr(objective, "loss", None)
    loss = loss.func if isinstance(loss, functools.partial) else loss
    name = next((name for name, known in LOSSES.items() if known is loss), None)
    if name is not None and name not in SOFTMAX:
        raise ConfigError(
            f"{run} is no image classifier: under its loss {name} the softmax of its outputs is no probability of "
            "classes; Trainer.predict gives the outputs as they are"
        )


def limits(name: str, feature: Any) -> tuple[float, float]:
    """The values of black and white in the model's input. Raises `ConfigError` if the feature does not define them.

    Without ``low`` and ``high`` a uint8 feature has 0 and 255.
    """
    if feature.dtype != "uint8" and (feature.low is None or feature.high is None):
        raise ConfigError(
            f"nothing says which values of {name}, {feature.dtype}, are black and white; in the recipe's data() write "
            f"data.declare({name}=sw.data.Feature({feature.shape}, {feature.dtype!r}, low=0, high=1)), with the limits "
            "that it has, and train again"
        )
    return feature.low or 0, 255 if feature.high is None else feature.high


def read(file: str, feature: Any, low: float, high: float, *, invert: bool) -> np.ndarray:
    """Read an image file as an array `(height, width, channels)` in the size and dtype of the model's input.

    Args:
        file: the path of the image file.
        feature: the input feature, whose shape is (height, width, channels) with 1 or 3 channels.
        low: the value of black.
        high: the value of white.
        invert: swap black and white.

    Raises:
        ConfigError: the feature has no fixed size, or another number of channels.
    """
    from sapwood.data import decode_image

    height, width, channels = feature.shape
    if None in (height, width) or channels not in (1, 3):
        raise ConfigError(f"the model takes images {feature.shape}; one size, and 1 or 3 channels are expected")
    pixels = decode_image(os.path.expanduser(file), grey=channels == 1, size=(height, width)).astype(np.float32) / 255
    values = low + (1 - pixels if invert else pixels) * (high - low)
    return (np.rint(values) if np.issubdtype(feature.dtype, np.integer) else values).astype(feature.dtype)
