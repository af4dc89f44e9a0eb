"""Shared fixtures: tiny models with non-degenerate random weights, and the golden reference model."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ.get("TCBENCH_TEST_THREADS", "1")  # before torch, whatever the cores

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before tcbench.kernels is imported

from tcbench.golden.weights import read_weights
from tcbench.method import Artefacts, Run
from tcbench.models.adapter import Adapter, Prompt, Text
from tcbench.models.dit import DiTAdapter
from tcbench.models.networks import build_transformer, fill_transformer
from tcbench.models.networks import make_adapter as adapt
from tcbench.models.specs import MODELS, DiTSpec, FluxSpec
from tcbench.samplers import ReferenceDDIM
from tcbench.shapes import BlockShape, Macs, ModelShape, cross_attention, mlp, self_attention
from tcbench.timesteps import respaced_timesteps
from tests import floors

NO_MACS = Macs()

GOLDEN = Path(__file__).parent / "golden"
LONGEST = ("test_workflow.py", "test_contract.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-combination", action="store_true", help="what is marked `combination` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first: at the end one core would work on them while the others wait."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--every-combination"):
        left_out = [item for item in items if item.get_closest_marker("combination")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("combination")]


@pytest.fixture(scope="session")
def every_combination(pytestconfig: pytest.Config) -> bool:
    """Whether tests that draw or pair what they try shall try all of it."""
    return bool(pytestconfig.getoption("--every-combination"))


@pytest.fixture(autouse=True, scope="session")
def threads():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_sessionfinish():
    floors.save_errors()


@pytest.fixture(scope="session")
def tiny() -> DiTAdapter:
    """Four blocks, 64 tokens; every layer shows in the output."""
    return make_adapter("tiny-dit")


@pytest.fixture(scope="session")
def golden_model() -> DiTAdapter:
    """The model the reference outputs were made with."""
    path = GOLDEN / "weights.safetensors"
    spec = MODELS["tiny-dit"]
    return DiTAdapter(fill_transformer(spec, read_weights(path), path), spec)


@pytest.fixture(scope="session")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the paper suites name, at toy size, but for Inception, which has one size."""
    from tcbench.config.load import load_suite
    from tests import official  # slow to import, and most tests do without

    folder = tmp_path_factory.mktemp("official")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        for config in official.CONFIGS:
            suite = load_suite(config)
            official.write_files(suite, {"inception"} | official.NOT_HERE)
    return folder


@pytest.fixture
def paper_folder(official_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the official files where the configs name them, and networks of their size."""
    from tests import official

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    official.shrink(monkeypatch)
    for shared in (*official_files.glob("checkpoints/*"), official_files / ".cache"):
        here = tmp_path / shared.relative_to(official_files)
        here.parent.mkdir(exist_ok=True)
        here.symlink_to(shared)
    shutil.copytree(official_files / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """Inception's weights as torch-fidelity publishes them, random, and the network they are of; made once."""
    from tests import official

    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    return path, official.write_inception(path)


@contextmanager
def not_laid_out() -> Iterator[None]:
    """Figures are drawn with their parts where these first are: laying them out takes as long as drawing them."""
    from matplotlib.figure import Figure  # slow to import, and most tests do without

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "get_layout_engine", lambda self: None)
        yield


def make_adapter(model: str, device: str = "cpu", **changes: int) -> Adapter:
    """A known model, or one that differs from it in `changes`, with random weights; every layer shows in the output."""
    spec = MODELS[model].model_copy(update=changes)
    return adapt(build_transformer(spec, device=device, seed=0, zero_init=False), spec)


def make_shape(
    num_blocks: int, side: int, text_tokens: int = 0, modulation: Macs = NO_MACS, outer: Macs = NO_MACS
) -> ModelShape:
    """A DiT 8 channels wide over side x side tokens, or a PixArt-alpha if it reads a text."""
    parts = [self_attention(8), cross_attention(8, text_tokens), mlp(8, 32)]
    block = BlockShape(tuple(part for part in parts if text_tokens or part.kind != "cross"), modulation)
    return ModelShape((block,) * num_blocks, side**2, 8, (side, side), outer=outer)


def make_run(adapter: Adapter, nfe: int, index: Tensor, artefacts: Artefacts | None = None) -> Run:
    """A guided run of the samples `index`."""
    timesteps = respaced_timesteps(nfe)
    return Run(
        adapter.shape,
        timesteps,
        adapter.spec.guidance(),
        index.to(adapter.model.device),
        artefacts=artefacts or Artefacts(),
        noise_levels=ReferenceDDIM(nfe).noise_levels,
    )


def make_prompt(adapter: Adapter, rows: int, seed: int = 0) -> Prompt:
    """Labels in turn, or captions of different lengths."""
    spec, generator = adapter.spec, torch.Generator().manual_seed(seed)
    if isinstance(spec, DiTSpec):
        return (torch.arange(rows) % spec.num_classes).to(adapter.model.device)
    states = torch.randn(rows, spec.caption_tokens, spec.caption_channels, generator=generator)
    mask = torch.arange(spec.caption_tokens) < 3 + torch.arange(rows)[:, None] * 4 % (spec.caption_tokens - 2)
    text = Text(states, mask)
    if not spec.null_caption:
        text = replace(text, negative=Text(torch.randn(1, *states.shape[1:], generator=generator), mask[:1]))
    if isinstance(spec, FluxSpec):
        pooled = torch.randn(rows, spec.pooled_channels, generator=generator)
        text = replace(text, pooled_RC=pooled, guidance_scale=3.5)
    return text.to(adapter.model.device)


def model_inputs(adapter: Adapter, rows: int, seed: int = 0) -> tuple[Tensor, Prompt]:
    """(latents [R, C, ...], labels [R] or captions) for one call of the model."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, *adapter.spec.latent_shape, generator=generator)
    return latent.to(adapter.model.device), make_prompt(adapter, rows)
