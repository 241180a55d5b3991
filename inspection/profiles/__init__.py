"""`profile`: the time of a training step by layer path, from a trace of `jax.profiler`, as a table or a page.

`trace` reads how long each operation ran, `attribution` finds the layer of each operation, and `profile` adds them up.
"""
