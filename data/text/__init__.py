"""Text: windows of characters for language models."""
