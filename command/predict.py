"""``sapwood predict RUN FILES...``: class and probability of image files."""

from typing import Any

import numpy as np

from sapwood.command import options
from sapwood.core.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Print file, class and probability, one file a line, in the order given."""
    parser = options.Parser("predict", "class and probability of image files, by a run's newest whole checkpoint")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("files", nargs="+", help="image files; resized, and made grey where the model wants that")
    parser.add_argument(
        "--invert", action="store_true", help="for dark on light, where the model learned light on dark"
    )
    options.add_machine(parser)
    found = parser.read(arguments)
    from sapwood.recipes.experiment import Experiment

    experiment = Experiment.open(found.run, options.machine(found))
    names = getattr(experiment.trainer.objective, "inputs", ())
    if len(names) != 1 or len(experiment.features[names[0]].shape) != 3:
        takes = ", ".join(names) or "what only its objective knows"
        raise ConfigError(f"{found.run} is no image classifier: its model takes {takes}")
    feature = experiment.features[names[0]]
    images = np.stack([read(file, feature, invert=found.invert) for file in found.files])
    logits = experiment.trainer.predict(experiment.restore(), {names[0]: images})
    classes = experiment.features[experiment.trainer.objective.target].classes
    for file, row in zip(found.files, logits.astype(np.float64), strict=True):
        odds = np.exp(row - row.max())
        best = int(row.argmax())
        print(f"{file}\t{classes[best] if classes else best}\t{odds[best] / odds.sum():.4f}")


def read(file: str, feature: Any, *, invert: bool) -> np.ndarray:
    """An image file as the model's input feature: its size, channels, range and dtype."""
    from sapwood.data import decode_image

    height, width, channels = feature.shape
    pixels = decode_image(file, grey=channels == 1, size=(height, width)).astype(np.float32) / 255
    low, high = feature.low or 0, 255 if feature.high is None else feature.high
    values = low + (1 - pixels if invert else pixels) * (high - low)
    return (np.rint(values) if np.issubdtype(feature.dtype, np.integer) else values).astype(feature.dtype)
