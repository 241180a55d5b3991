"""Normalization layers, one a file. `moments` has the mean and variance that they share."""
