"""Array functions and layers, one family a file."""
