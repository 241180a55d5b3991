"""Adapters with which optax optimizers work on scanned (stacked) models, and the learning rate of a step."""
