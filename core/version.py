"""The version of Sapwood. It is stored in every file that Sapwood writes."""

__version__ = "0.1.0"
