"""Explain a PyTorch model that takes several inputs, without editing it."""

__version__ = "0.1.0"
