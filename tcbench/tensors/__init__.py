"""Tensors by themselves, without caching: random ones, grouped ones, and those of which only the shape is known."""
