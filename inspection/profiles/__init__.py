"""`profile`: the time of a training step by layer path, from a trace of `jax.profiler`, as a table or a page."""
