"""Data: load data sets, check their examples, batch them in a seekable order, feed the batches to the devices.

    data = load("digits")                      # Dataset: random access, checked features
    stream = batches(data, 32, seed=0)         # Batches: position = one integer, the same for any number of processes
    for batch in to_device(stream, sharding):  # global jax.Arrays, read ahead
        ...

Importing this room imports NumPy but no other library for data: grain, TensorFlow Datasets, pyarrow and Pillow are
imported on first use. `sources/` has one file per kind of source, `image/` the image decoder, `text/` text.
"""

from typing import TYPE_CHECKING, Any

from sapwood.core import migration_hints
from sapwood.data.batching import Batches, batches
from sapwood.data.dataset import Dataset
from sapwood.data.device_feed import DeviceBatches, to_device
from sapwood.data.feature import Feature
from sapwood.data.image.decode import decode as decode_image
from sapwood.data.learned_features import Learned
from sapwood.data.loading import load
from sapwood.data.prepared_directory import data_directory
from sapwood.data.sources.source import Source
from sapwood.data.text.characters import characters, decode, encode

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return migration_hints.missing("sapwood.data", migration_hints.DATA, name, __all__)


__all__ = [
    "Batches",
    "Dataset",
    "DeviceBatches",
    "Feature",
    "Learned",
    "Source",
    "batches",
    "characters",
    "data_directory",
    "decode",
    "decode_image",
    "encode",
    "load",
    "to_device",
]
