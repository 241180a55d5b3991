"""Sapwood: a model is a pure function of variables and inputs."""

__version__ = "0.1.0"
