"""tcbench: one referee for caching methods on diffusion transformers, at matched compute."""

__version__ = "0.1.0"
