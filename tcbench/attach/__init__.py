"""Caching methods on pipelines of diffusers' own: what each does around its transformer, one call, on and off."""
