"""Whole networks made of layers, one family a file."""
