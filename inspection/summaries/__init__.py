"""`summary`: layers, shapes, parameters and FLOPs of a model, as a table or a tree.

`summary` makes the rows; `text` writes them as a table, `tree` as a tree for notebooks.
"""
