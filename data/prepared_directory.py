"""The directory of prepared data sets."""

import os
from pathlib import Path


def data_directory(given: str | Path | None = None) -> Path:
    """The directory of prepared data sets: `given`, `$SAPWOOD_DATA_DIR`, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    The first of these that is set is used. The last is the default of TensorFlow Datasets, so that each library finds
    what the other prepared.

    Example:
        >>> data_directory("/data").name
        'data'
    """
    for place in (given, os.environ.get("SAPWOOD_DATA_DIR"), os.environ.get("TFDS_DATA_DIR")):
        if place:
            return Path(place).expanduser()
    return Path.home() / "tensorflow_datasets"
