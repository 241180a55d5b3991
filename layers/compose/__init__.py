"""Layers made of layers: Sequential, Scan (also as a pipeline), Vmap and Remat."""
