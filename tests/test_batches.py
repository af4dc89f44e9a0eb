"""Batches by captured steps: the samples and records of batches one by one, whatever changes from batch to batch.

Graphs are captured here by recording torch's operations with the tensors that they read and wrote, which is what a CUDA
graph does: whatever the host decided while they were recorded is decided for good. Tests
marked `on_gpu` do it with real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcbench.batches import Batches, Row
from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.models.predictor import CachePredictor
from tcbench.plan import ALL, Block, Decision, Plan, Tokens
from tcbench.registry import make_method
from tcbench.replay import Replay
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Samples, sample_batch
from tests.conftest import make_adapter, make_prompt

NFE, SIZE = 5, 2
SETTINGS = {
    "tiny-dit": SamplerSettings(1.5),
    "tiny-pixart": SamplerSettings(4.5, solver="dpm"),
    "tiny-osp": SamplerSettings(7.5, solver="euler_ancestral"),
    "tiny-flux": SamplerSettings(3.5, solver="flow"),
    "tiny-wan": SamplerSettings(5.0, solver="flow_unipc"),  # takes its steps between graphs
}
METHODS: dict[str, dict[str, Any]] = {
    "uncached": {},
    "fewer_steps": {"steps": 4},
    "fora": {"interval": 2},
    "toca": {"interval": 2, "fresh_ratio": 0.5, "schedule": "constant"},
    "hicache": {"interval": 2, "first_steps": 1},
    "duca": {"interval": 2, "fresh_ratio": 0.3},
    "clusca": {"interval": 2, "clusters": 5, "ratio": 0.2, "iterations": 5, "first_steps": 1},
    "random_tokens": {"num_full_steps": 2, "refiner_blocks": 1, "cache_ratio": 0.5},
    "tokencache": {
        "num_full_steps": 2, "refiner_blocks": 1, "cache_ratio": 0.5, "beta": -2000, "schedule": "even",
        "allocation": "uniform",
    },
}  # fmt: skip
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")


class _Recorder(TorchDispatchMode):
    def __init__(self, recorded: list[Any]) -> None:
        super().__init__()
        self.recorded = recorded

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        self.recorded.append((operation, arguments, named or {}, result))
        return result


class RecordedGraph:
    """Operations with their tensors."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []
        self.mode = _Recorder(self.recorded)
        self.mode.__enter__()

    def capture_end(self) -> None:
        self.mode.__exit__(None, None, None)

    def replay(self) -> None:
        for operation, arguments, named, result in self.recorded:
            again = operation(*arguments, **named)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    return [part for part in (result if isinstance(result, tuple | list) else [result]) if isinstance(part, Tensor)]


class RecordedGraphs:
    @contextmanager
    def capturing(self) -> Iterator[None]:
        yield

    def begin(self) -> RecordedGraph:
        return RecordedGraph()


def artefacts_of(adapter: Adapter) -> Artefacts:
    scorer = CachePredictor(adapter)
    weight = scorer.head.weight
    with torch.no_grad():  # drawn on the host, so that it is the same everywhere
        weight.copy_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return Artefacts({"predictor": scorer.eval().requires_grad_(False)})


def row_of(adapter: Adapter, method: Method) -> Row:
    settings = SETTINGS[adapter.spec.name]
    every = make_prompt(adapter, rows=16)
    prompts = None if isinstance(every, Tensor) else lambda index: every[index]
    return Row("row", adapter, method, NFE, settings, artefacts_of(adapter), prompts)


def as_they_are(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples, samples.isnan().flatten(1).any(1)


def one_by_one(row: Row, index: Tensor) -> Samples:
    return sample_batch(row.adapter, row.method, NFE, row.settings, index, row.artefacts, 0, row.prompts)


def assert_batches_are_those_one_by_one(row: Row, captured: Batches) -> None:
    indices = [torch.arange(start, min(start + SIZE, 7)) for start in range(0, 7, SIZE)]
    finishes = [captured(index) for index in indices]  # all before any is waited for
    for index, finish in zip(indices, finishes, strict=True):
        expected, samples = one_by_one(row, index), finish()
        assert torch.equal(samples.image, expected.image), f"samples {index.tolist()}"
        assert torch.equal(samples.label, expected.label)
        assert samples.macs == expected.macs and samples.plans == expected.plans
        assert samples.cache_bytes == expected.cache_bytes
        assert samples.x0.shape == expected.x0.shape and samples.xt.shape == expected.xt.shape


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("tiny-dit", name) for name in METHODS),
        # what differs by model is shown by two methods
        *((model, name) for model in ("tiny-pixart", "tiny-osp") for name in ("toca", "random_tokens")),
        *((model, name) for model in ("tiny-flux", "tiny-wan") for name in ("fora", "tokencache")),
    ],
)
def test_captured_batches_are_those_one_by_one(model: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    row = row_of(make_adapter(model), make_method(name, METHODS[name]))
    assert_batches_are_those_one_by_one(row, Batches(row, as_they_are, RecordedGraphs()))
    assert capfd.readouterr().err == "", "batches were not captured"


class Stale(Method):
    """Draws its tokens when the run starts, so that captured steps would give all batches those of one."""

    name = "stale"
    label = "stale"

    def start(self, run: Run) -> "_Drawn":
        return _Drawn(run.sample_index.clone())


class _Drawn:
    def __init__(self, index: Tensor) -> None:
        self.index = index

    def plan(self, look: Look) -> Plan:
        if look.step == 0:
            return Plan({Block(0): Decision(ALL)})
        place = (self.index.repeat(look.run.rows_per_sample) * 7 % look.run.shape.num_tokens)[:, None]
        return Plan({Block(0): Decision(Tokens(place), keys="recomputed")})


class HostTokens(Stale):
    """Copies from the host inside a step, which no graph can."""

    name = "host_tokens"

    def start(self, run: Run) -> "_Copied":
        return _Copied(run.sample_index)


class _Copied(_Drawn):
    def plan(self, look: Look) -> Plan:
        if look.step:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().plan(look)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Stale(), "captured steps give other samples"),
        (make_method("teacache", {}), "teacache decides on the host"),
        (make_method("first_block", {}), "first_block decides on the host"),
    ],
)
def test_what_cannot_be_captured_is_sampled_one_by_one_and_said(
    tiny: Adapter, method: Method, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    row = row_of(tiny, method)
    assert_batches_are_those_one_by_one(row, Batches(row, as_they_are, RecordedGraphs()))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("row: batches are sampled one by one: ") and says in line


class RoundsOtherwise(RecordedGraphs):
    """As a library may that takes other kernels inside a capture."""

    def begin(self) -> RecordedGraph:
        graph = RecordedGraph()
        replay = graph.replay

        def replay_otherwise() -> None:
            replay()
            results = [tensor for *_, result in graph.recorded for tensor in _tensors(result)]
            floating = [tensor for tensor in results if tensor.is_floating_point()]
            for tensor in floating[-1:]:
                tensor.mul_(1 + 2**-20)

        graph.replay = replay_otherwise  # type: ignore[method-assign]
        return graph


def test_captured_steps_that_round_otherwise_are_not_used(tiny: Adapter, capfd: pytest.CaptureFixture[str]) -> None:
    """Else samples would depend on which batch was a process's first, that is on where an interrupted run stopped."""
    row = row_of(tiny, make_method("fora", METHODS["fora"]))
    assert_batches_are_those_one_by_one(row, Batches(row, as_they_are, RoundsOtherwise()))
    (line,) = capfd.readouterr().err.splitlines()
    assert "sampled one by one: captured steps give other samples (by " in line


class NoGraphs(RecordedGraphs):
    def begin(self) -> RecordedGraph:
        raise RuntimeError  # as a driver may, without a word


def test_a_capture_that_fails_and_one_that_is_switched_off(
    tiny: Adapter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    row = row_of(tiny, make_method("uncached", {}))
    assert_batches_are_those_one_by_one(row, Batches(row, as_they_are, NoGraphs()))
    monkeypatch.setenv("TCBENCH_GRAPHS", "off")
    assert_batches_are_those_one_by_one(row, Batches(row, as_they_are, RecordedGraphs()))
    failed, off = capfd.readouterr().err.splitlines()
    assert failed.endswith("its steps cannot be captured (RuntimeError)") and off.endswith("TCBENCH_GRAPHS is off")
    monkeypatch.setenv("TCBENCH_GRAPHS", "no")
    with pytest.raises(UserError, match="TCBENCH_GRAPHS=no: is not known; set it to off, or unset it"):
        Batches(row, as_they_are, RecordedGraphs())


def test_counts_that_the_device_knows_are_accounted_for_batch_by_batch(tiny: Adapter) -> None:
    """TokenCache's shares of blocks follow the batch's scores, and so do its MACs."""
    row = row_of(tiny, make_method("tokencache", METHODS["tokencache"] | {"allocation": "batch"}))
    # without graphs, because the plain blocks read the counts
    replay = Replay(tiny, row.method, NFE, row.settings, torch.arange(SIZE), row.artefacts, path="plain", ahead=False)
    for start in (0, 4, 2):
        replay.fill(index := torch.arange(start, start + SIZE))
        image, expected = replay.run(), one_by_one(row, index)
        assert torch.equal(image, expected.image)
        macs, plans = replay.account(replay.counts.tolist())
        assert (macs, plans) == (expected.macs, expected.plans)
        assert len(replay.counts)


def test_a_broken_sample_is_named(tiny: Adapter) -> None:
    row = row_of(tiny, make_method("uncached", {}))
    batches = Batches(row, as_they_are, RecordedGraphs())
    batches(torch.arange(2))
    batches(torch.arange(2, 4))()
    captured = batches._replay
    assert captured is not None
    captured.run = lambda: torch.full((2, 4, 16, 16), float("nan"))  # type: ignore[method-assign]
    finish = batches(torch.tensor([4, 5]))
    with pytest.raises(UserError, match="uncached: sample 4 became NaN"):
        finish()


def test_latents_are_float32_around_a_network_of_16_bits(tiny: Adapter) -> None:
    """Guidance and sampler add up what bfloat16 would lose, so samples differ by the network's rounding alone."""
    half = _in(torch.bfloat16)
    index, method = torch.arange(2), make_method("uncached", {})
    exact = sample_batch(tiny, method, 20, SETTINGS["tiny-dit"], index, traced=1)
    rounded = sample_batch(half, method, 20, SETTINGS["tiny-dit"], index, traced=1)
    assert rounded.image.dtype == torch.float32
    assert not torch.equal(rounded.image, rounded.image.bfloat16().float())
    apart = (rounded.image - exact.image).square().mean().sqrt() / exact.image.square().mean().sqrt()
    assert 0 < apart < 0.05


def _in(dtype: torch.dtype) -> Adapter:
    adapter = make_adapter("tiny-dit")
    adapter.model.to(dtype)
    return adapter


# --- on a GPU


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*METHODS, "tokencache-batch"])
@pytest.mark.parametrize("model", ["tiny-dit", "tiny-pixart", "tiny-osp"])
def test_cuda_graphs_give_the_batches_one_by_one(
    model: str, name: str, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(model, "cuda")
    adapter.model.to(dtype)
    options = METHODS["tokencache"] | {"allocation": "batch"} if name == "tokencache-batch" else METHODS[name]
    row = row_of(adapter, make_method(name.removesuffix("-batch"), options))
    assert_batches_are_those_one_by_one(row, Batches(row, as_they_are))
    assert capfd.readouterr().err == "", "batches were not captured"


@on_gpu
@pytest.mark.parametrize(
    ("method", "says"), [(Stale(), "captured steps give other samples"), (HostTokens(), "cannot be captured")]
)
def test_a_gpu_that_cannot_capture_goes_on_one_by_one(
    method: Method, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    row = row_of(make_adapter("tiny-dit", "cuda"), method)
    if isinstance(method, HostTokens):
        row = replace(row, method=make_method("uncached", {}))
        batches = Batches(row, as_they_are)
        first = batches(torch.arange(SIZE))
        batches.row = replace(row, method=method)
        assert torch.equal(first().image, one_by_one(row, torch.arange(SIZE)).image)
        assert batches._captured(torch.arange(SIZE)) is None
    else:
        assert_batches_are_those_one_by_one(row, Batches(row, as_they_are))
    assert says in capfd.readouterr().err


class Waits(Stale):
    """Has the host wait inside a step, so that the driver breaks the capture off."""

    name = "waits"

    def start(self, run: Run) -> "_Waiting":
        return _Waiting(run.sample_index)


class _Waiting(_Drawn):
    def plan(self, look: Look) -> Plan:
        assert self.index.sum().item() >= 0
        return super().plan(look)


@on_gpu
def test_a_capture_that_the_driver_breaks_off_leaves_the_next_row_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter("tiny-dit", "cuda")
    for method in (Waits(), make_method("uncached", {})):
        row = row_of(adapter, method)
        assert_batches_are_those_one_by_one(row, Batches(row, as_they_are))
    (line,) = capfd.readouterr().err.splitlines()
    assert "its steps cannot be captured" in line
