"""`summary`: layers, shapes, parameters and FLOPs of a model, as a table or a tree."""
