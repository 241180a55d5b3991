"""Attention: the layer, the ways to compute it on one device or over several, and positions."""
