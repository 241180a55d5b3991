"""`show` and `layout`: where each array of a model or a training run lives on a mesh, as a table or a page."""
