"""The pure training step: forward pass, gradient, accumulation, checks, loss scale. It touches no clock and no file."""
