"""Normalization layers, one a file. `statistics` has the mean and variance that they share."""
