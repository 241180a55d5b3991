"""`show` and `layout`: the sharding and the bytes of each array of a model or a training run, as a table or a page.

`show` is for the parameters of a model; `layout` is for a trainer and adds optimizer state, batch and activations.
Nothing is allocated.
"""
