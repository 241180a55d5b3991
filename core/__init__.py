"""The kernel: variables, declaration, initialisation, precision and errors; knows only JAX."""
