"""Images: the decoder that all sources use, and columns of images that are decoded when they are read."""
