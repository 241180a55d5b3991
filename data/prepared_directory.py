"""Where prepared data sets are kept."""

import os
from pathlib import Path


def data_directory(given: str | Path | None = None) -> Path:
    """The directory of prepared data sets: `given`, else `$SAPWOOD_DATA_DIR`, else `$TFDS_DATA_DIR`, else
    `~/tensorflow_datasets`, where TensorFlow Datasets keeps its own, so that each finds what the other prepared.

    Example:
        >>> data_directory("/data").name
        'data'
    """
    for place in (given, os.environ.get("SAPWOOD_DATA_DIR"), os.environ.get("TFDS_DATA_DIR")):
        if place:
            return Path(place).expanduser()
    return Path.home() / "tensorflow_datasets"
