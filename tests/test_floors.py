"""The floors of tests/floors.py: float32 stays on them beside float64, and mistakes stand out from what they allow."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tcbench.guidance import GuidedPair
from tcbench.models.adapter import Adapter, Text
from tcbench.models.networks import make_adapter as adapt
from tcbench.samplers import ReferenceDDIM
from tests.conftest import make_adapter, model_inputs
from tests.floors import NETWORK, TRAJECTORY, Floor, assert_close, deviation

NFE = 10
MODELS = pytest.mark.parametrize("model", ["tiny-dit", "tiny-pixart", "tiny-osp"])


def double(adapter: Adapter) -> Adapter:
    return adapt(copy.deepcopy(adapter.model).double(), adapter.spec)


@torch.inference_mode()
def output_of(adapter: Adapter) -> Tensor:
    latent, prompt = model_inputs(adapter, 2)
    prompt = prompt.to(adapter.device, adapter.dtype) if isinstance(prompt, Text) else prompt
    return adapter.plain(latent.to(adapter.dtype), torch.full((2,), 300), prompt)


@torch.inference_mode()
def sample(adapter: Adapter, scale: float = 1.5, guided_channels: int = 3, shift: int = 0) -> Tensor:
    """DDIM, with the class labels of `model_inputs`; every timestep the network sees may be shifted."""
    latent, label = model_inputs(adapter, 2)
    x, sampler = latent.to(adapter.dtype), ReferenceDDIM(NFE)
    rows, guidance = adapter.guided(label), GuidedPair(scale, guided_channels)
    for step, timestep in enumerate(sampler.timesteps):
        output = adapter.plain(torch.cat([x, x]), torch.full((4,), timestep + shift), rows)
        x, _ = sampler.step(guidance.combine([output[:, :4]]), step, x)
    return x


@MODELS
def test_a_pass_in_float32_is_that_in_float64(model: str) -> None:
    adapter = make_adapter(model)
    assert_close(output_of(adapter), output_of(double(adapter)), NETWORK)


def test_a_run_in_float32_is_that_in_float64(tiny) -> None:
    assert_close(sample(tiny), sample(double(tiny)), TRAJECTORY)


def exact_gelu(adapter: Adapter) -> None:
    """The error function in the last block, where the models have its approximation by tanh."""
    adapter.blocks[-1].ff.net[0].approximate = "none"


def head_scale(adapter: Adapter) -> None:
    """Attention divided by the root of the width, not of a head's."""
    adapter.blocks[1].attn1.to_q.weight /= 2


@MODELS
@pytest.mark.parametrize("mistake", [exact_gelu, head_scale])
def test_a_mistake_in_a_network_stands_out(model: str, mistake: Callable[[Adapter], None]) -> None:
    adapter = make_adapter(model)
    expected = output_of(adapter)
    with torch.no_grad():
        mistake(adapter)
    assert deviation(output_of(adapter), expected) > NETWORK.allowed


@pytest.mark.parametrize("mistake", [{"scale": 1.51}, {"guided_channels": 4}, {"shift": 1}], ids=str)
def test_a_mistake_in_a_run_stands_out(tiny, mistake: dict) -> None:
    assert deviation(sample(tiny, **mistake), sample(tiny)) > 10 * TRAJECTORY.allowed


@pytest.mark.parametrize(
    ("actual", "says"),
    [([1.0, 2.003], "error 1.5e-03"), ([1.0, float("nan")], "error nan"), ([1.0], r"shape \[1\], expected \[2\]")],
)
def test_what_is_not_close_is_said(actual: list[float], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.floors._seen", {})  # these errors are made up
    floor = Floor("test", 1e-4, "of this test")
    assert_close([1.0, 2.0019], [1.0, 2.0], floor)
    with pytest.raises(AssertionError, match=says):
        assert_close(actual, [1.0, 2.0], floor)
