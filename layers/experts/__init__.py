"""Mixtures of experts: routing, dispatch of tokens to devices and back, grouped matrix products."""
