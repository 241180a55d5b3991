"""The pure training step: forward pass, gradient, accumulation, checks, loss scale. It reads no clock and no file."""
