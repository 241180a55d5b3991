"""What a run leaves in its directory: rows of metrics, TensorBoard events, curves, progress lines, one writer."""
