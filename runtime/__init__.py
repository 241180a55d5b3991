"""How programs run on this host: compiler options, the compile cache, malloc, lines on a terminal, several processes.

Nothing here depends on models or training. Import its files by name: the package itself exports nothing.
"""
