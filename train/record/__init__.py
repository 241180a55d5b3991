"""The record of a run: metric logs, curves, progress lines, and the run directory with its lock and checkpoints.

`run_directory` ties the logs, the lock and the checkpoints together for `fit`. `run_identity` compares the trainer and
the data of a resumed run with those of the checkpoint.
"""
