"""Denoisers (specs: shapes, building, loading, saving) and the digits feature extractor (classifier)."""
