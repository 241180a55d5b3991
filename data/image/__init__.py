"""Images: the one decoder that all sources use, and columns of images that are decoded when they are asked for."""
