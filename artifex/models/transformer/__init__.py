"""Transformers: the dense decoder."""
