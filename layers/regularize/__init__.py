"""Regularization layers: active in training, the identity in eval mode."""
