"""Layers over spatial dimensions: convolutions, pooling, flattening, and the windows that slide over an image."""
