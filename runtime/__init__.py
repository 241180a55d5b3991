"""How programs run on this host: compiler options, the compile cache, malloc, lines on a terminal, several processes.

Nothing here knows a model. Its files are imported by name.
"""
