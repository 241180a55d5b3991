"""grain without training: a random-access source of image files, decoded by Pillow, in batches."""

import grain
import numpy as np
from PIL import Image

from benchmarks.job import reader


class Images:
    """The images of a folder with a subfolder for each class, as dicts of image and label."""

    def __init__(self, root):
        names = sorted(folder.name for folder in root.iterdir())
        self.files = [(path, i) for i, name in enumerate(names) for path in sorted((root / name).iterdir())]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        with Image.open(path) as image:
            pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # which would copy
            return {"image": pixels, "label": np.int32(label)}


def reading(work):
    data = grain.MapDataset.source(Images(work.directory / "images")).repeat().batch(32)
    at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # it would read ahead while others are timed
    return reader(iter(data.to_iter_dataset(at_once)))
