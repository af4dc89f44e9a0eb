"""Shared fixtures: tiny models with non-degenerate random weights, and the golden reference model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: results must not depend on the machine's cores

from pathlib import Path

import pytest
import torch

from tcbench.models.dit import DiTAdapter
from tcbench.models.specs import MODELS, build_transformer, load_transformer

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> DiTAdapter:
    """Four blocks, 64 tokens; every layer shows in the output."""
    spec = MODELS["tiny-dit"]
    return DiTAdapter(build_transformer(spec, seed=0, zero_init=False), spec)


@pytest.fixture(scope="session")
def golden_model() -> DiTAdapter:
    """The model the reference outputs were made with."""
    spec = MODELS["tiny-dit"]
    return DiTAdapter(load_transformer(spec, GOLDEN / "weights.safetensors"), spec)
