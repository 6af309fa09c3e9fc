"""Adapters as tensors and as files."""
