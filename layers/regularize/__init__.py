"""Regularization: layers that change what they are given while a model trains, and nothing in eval mode."""
