"""Normalization, one kind a file. The statistics that they share are in `statistics`."""
