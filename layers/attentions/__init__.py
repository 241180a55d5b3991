"""Attention layers, their implementations for one device and for several, and position embeddings."""
