"""Importers and exporters: none yet."""
