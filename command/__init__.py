"""The commands of the command line, one per file. `sapwood.__main__` dispatches to their ``main``."""
