"""Shared fixtures: tiny models with non-degenerate random weights, and the golden reference model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: results must not depend on the machine's cores

from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before tcbench.kernels is imported

from tcbench.method import Artefacts, Run
from tcbench.models.dit import DiTAdapter
from tcbench.models.specs import MODELS, build_transformer, load_transformer
from tcbench.sampling import respaced_timesteps

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> DiTAdapter:
    """Four blocks, 64 tokens; every layer shows in the output."""
    return make_adapter("tiny-dit")


@pytest.fixture(scope="session")
def golden_model() -> DiTAdapter:
    """The model the reference outputs were made with."""
    spec = MODELS["tiny-dit"]
    return DiTAdapter(load_transformer(spec, GOLDEN / "weights.safetensors"), spec)


def make_adapter(model: str, device: str = "cpu") -> DiTAdapter:
    """A known model with random weights; every layer shows in the output."""
    spec = MODELS[model]
    return DiTAdapter(build_transformer(spec, device=device, seed=0, zero_init=False), spec)


def make_run(adapter: DiTAdapter, nfe: int, index: Tensor, artefacts: Artefacts | None = None) -> Run:
    """A guided run of the samples `index`."""
    timesteps = respaced_timesteps(nfe)
    return Run(adapter.shape, timesteps, True, index.to(adapter.model.device), artefacts=artefacts or Artefacts())


def model_inputs(adapter: DiTAdapter, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(latents [R, C, H, W], labels [R]) for one call of the model."""
    spec, generator = adapter.spec, torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, spec.in_channels, spec.sample_size, spec.sample_size, generator=generator)
    label = torch.arange(rows) % spec.num_classes
    return latent.to(adapter.model.device), label.to(adapter.model.device)
