"""`input`: training on real data against the same step on a batch on the device; and reading images without training.

The data are the handwritten digits, as 8x8 arrays and as a folder of PNG files enlarged to 64x64. Sapwood keeps decoded
images that fit in memory. Here only "sapwood-remembered" does; the other systems decode in each pass.
"""

from pathlib import Path

import numpy as np

from benchmarks.suite import Goal, Suite, beats

COUNT = 1536


def prepare(directory: Path) -> None:
    """Write a folder of PNG images by class, made from the digits."""
    from PIL import Image

    import sapwood.data

    digits = sapwood.data.load("digits", "train").gather(np.arange(COUNT) % 1437)
    for i, (image, label) in enumerate(zip(digits["image"], digits["label"], strict=True)):
        path = directory / "images" / str(label) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((image[..., 0] * 15).astype("uint8"))
        pixels.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB").save(path)


SUITES = (
    Suite(
        "input-digits",
        "fit on the digits (8x8 arrays) against its own step on a resident batch",
        systems=("sapwood-step", "sapwood-step again", "sapwood"),
        model="digits",
        steps=512,
        goals=(Goal("sapwood", "sapwood-step", 1.02),),
    ),
    Suite(
        "input-images",
        "fit on a folder of PNG images (64x64), decoded each pass or remembered, against its step on a resident batch",
        systems=("sapwood-step", "sapwood-step again", "sapwood", "sapwood-remembered"),
        model="images",
        steps=48,  # of an epoch
        goals=(Goal("sapwood", "sapwood-step", 1.02), Goal("sapwood-remembered", "sapwood-step", 1.02)),
        prepare=prepare,
    ),
    Suite(
        "input-reading",
        "reading and decoding 64x64 PNG files alone, a batch of 32 on one core; the floor is grain alone",
        systems=("grain", "grain again", "sapwood-read", "sapwood-remembered", "torch"),
        model="reading",
        steps=16,
        threads=1,
        goals=beats("sapwood-read", "grain", "torch"),
        prepare=prepare,
    ),
)
