"""Sources, batching and the device feed."""
