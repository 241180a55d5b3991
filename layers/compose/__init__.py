"""Layers made of layers: in sequence, scanned over depth, side by side, rematerialized, as a pipeline."""
