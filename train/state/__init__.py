"""The training state: its fields, how it is made, sharded, offloaded and restored, and which parameters train."""
