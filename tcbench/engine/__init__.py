"""Executes plans: units of a plan by plain layers or fused kernels, cached features, and the differentiable path."""
