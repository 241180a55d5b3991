"""The version of Sapwood. Files that it writes carry it."""

__version__ = "0.1.0"
