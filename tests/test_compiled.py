"""Compiled blocks do what plain blocks do: the same plans, and latents that differ by rounding.

On a CPU torch traces as ever but runs its own operations, which takes no compiler of C++; on a GPU it compiles.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tcbench.engine.compiled import CompiledBlocks
from tcbench.engine.fastest import fastest
from tcbench.engine.plain import PlainBlocks
from tcbench.errors import UserError
from tcbench.models.adapter import Adapter
from tcbench.registry import make_method
from tcbench.replay import Replay
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Passes, denoise, initial_noise, start_run
from tests.conftest import make_adapter, make_prompt
from tests.floors import TRAJECTORY, assert_close
from tests.test_fused import artefacts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"
NFE = 4
METHODS: dict[str, dict[str, Any]] = {
    "uncached": {},
    "fora": {"num_full_steps": 2},
    "taylorseer": {"interval": 2, "order": 1},
    "toca": {"interval": 2, "fresh_ratio": 0.3},  # reads attention, and that over the text
    "duca": {"interval": 2, "fresh_ratio": 0.3},  # reads values' lengths
    "dbcache": {"first_blocks": 1, "last_blocks": 1, "warmup_steps": 1, "threshold": 0.5},
    "tokencache": {"num_full_steps": 2, "refiner_blocks": 1, "schedule": "even", "beta": -1.0, "cache_ratio": 0.7},
}


@pytest.fixture(scope="module", params=["tiny-flux", "tiny-wan"])
def model(request: pytest.FixtureRequest) -> Adapter:
    return make_adapter(request.param, DEVICE)


@torch.inference_mode()
def sample(adapter: Adapter, name: str, blocks: Any) -> tuple[Tensor, Passes]:
    index, settings = torch.arange(2), SamplerSettings(1.5, solver=adapter.spec.solvers[0])
    method = make_method(name, METHODS[name])
    sampler, run = start_run(adapter, method, NFE, settings, index, artefacts(adapter, NFE))
    passes = Passes(adapter, run, method.start, blocks)
    x = initial_noise(adapter, 0, index).to(DEVICE)
    *_, (_, _, final) = denoise(passes, sampler, x, make_prompt(adapter, 2).to(DEVICE))
    return final, passes


@pytest.mark.parametrize("name", METHODS)
def test_the_same_plans_and_latents(model: Adapter, name: str) -> None:
    plain, expected = sample(model, name, PlainBlocks)
    compiled, passes = sample(model, name, partial(CompiledBlocks, compiler=COMPILER))
    assert_close(compiled, plain, floor=TRAJECTORY)
    assert passes.plans == expected.plans and passes.macs == expected.macs
    assert passes.cache_bytes == expected.cache_bytes


def test_blocks_of_one_class_share_their_code(model: Adapter) -> None:
    """Compiling every block of a large model would take minutes."""
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    sample(model, "uncached", partial(CompiledBlocks, compiler=COMPILER))
    # FLUX.1: two parts of a double block, a single block, and sums behind both; Wan 2.1: three parts, two kinds of sums
    assert graphs["unique_graphs"] - before == 5


def test_what_is_chosen() -> None:
    """Parts are compiled on a GPU, where no kernels serve the model."""
    flux = make_adapter("tiny-flux")
    assert fastest(flux) is PlainBlocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(flux), "device", torch.device("cuda"))
        assert fastest(flux) is CompiledBlocks
        patch.setenv("TCBENCH_COMPILE", "off")
        assert fastest(flux) is PlainBlocks
        patch.setenv("TCBENCH_COMPILE", "no")
        with pytest.raises(UserError, match="TCBENCH_COMPILE=no: is not known; set it to off, or unset it"):
            fastest(flux)


def test_a_compiler_that_fails_says_how_to_go_without(model: Adapter) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no C compiler found")

    with pytest.raises(UserError, match=r"no C compiler found.*TCBENCH_COMPILE=off runs the model's own layers"):
        sample(model, "uncached", partial(CompiledBlocks, compiler=broken))


def test_nothing_is_captured_where_the_host_counts_tokens(model: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """TokenCache shares tokens out over blocks on the device; a captured step could not ask how many they are."""
    blocks = partial(CompiledBlocks, compiler=COMPILER)
    blocks.counts_on_device, blocks.execution = False, "compiled"  # type: ignore[attr-defined]
    monkeypatch.setattr("tcbench.replay.fastest", lambda adapter: blocks)
    captured: list[str] = []
    monkeypatch.setattr("tcbench.replay.CudaGraphs", lambda: captured.append("graphs"))
    monkeypatch.setattr(Replay, "_capture", lambda self, graphs: None)
    settings = SamplerSettings(1.5, solver=model.spec.solvers[0])
    prompt = make_prompt(model, 2)
    for name, expected in (("fora", 1), ("tokencache", 0)):
        captured.clear()
        method = make_method(name, METHODS[name])
        replay = Replay(
            model, method, NFE, settings, torch.arange(2), artefacts(model, NFE), prompts=lambda index: prompt[index]
        )
        assert len(captured) == expected and (replay.reads > 0) == (not expected)
