"""Whole networks made of layers, one family a file."""

from sapwood.models.language.decoder import Decoder

__all__ = ["Decoder"]
