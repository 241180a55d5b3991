"""Ready experiments, one a file: what `sapwood train NAME` runs."""
