"""The state of a run: what is in it, how it is made, sharded, offloaded and restored, and what trains."""
