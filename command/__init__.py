"""The command line's commands, one a file; `sapwood.__main__` chooses among them."""
