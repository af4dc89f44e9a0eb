"""Fused kernels of the fast blocks, each beside the plain PyTorch that says what it computes.

Functions take `backend`: "triton" launches the kernel, "torch" runs the reference. The references of `selection` and
`choice` are the functions of `tcbench.choose`, which call the kernels where `serves` says so. `available` says whether
a device can run the kernels; without one, or without Triton, nothing in the project needs this package. The kernels are
tested against their references in Triton's interpreter on the CPU (tests/test_kernels.py).

Shapes: R rows of the transformer's batch, N tokens, D width, H heads, K at most this many recomputed tokens a row,
M = R * K rows of a compact buffer. The tokens recomputed are `Chosen`; a compact buffer holds them row after row, so
that position m belongs to row m // used and to its (m % used)-th chosen token, and positions from R * used on are
undefined.
"""

from tcbench.kernels.chosen import Chosen, available

__all__ = ["Chosen", "available"]
