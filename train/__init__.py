"""Objectives, the training step and loop, metrics, checkpoints, callbacks."""
