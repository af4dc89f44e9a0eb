"""One batch's run prepared once and repeated without the host deciding anything: for timing, and for many batches."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from tcbench.checking import values_unchecked
from tcbench.engine.fused import FusedBlocks, can_fuse
from tcbench.engine.plain import PlainBlocks
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter
from tcbench.samplers import SamplerSettings, ancestral_noise, make_sampler
from tcbench.sampling import Passes, Prompts, default_prompts, denoise, initial_noise, start_run
from tcbench.undisturbed import undisturbed

ExecutionPath = Literal["fused", "plain"]


class Replay:
    """A run that can be repeated step by step; every repetition starts from the same noise and an empty cache.

    With fused blocks on a GPU every step is a captured CUDA graph. A method's decisions are captured with it: they are
    kernels that read the current latents. Where a method decides on the host, a step is as many graphs as its reads cut
    it into; a repetition waits for each number again, and takes the outcome that was captured, because it starts from
    the same noise.

    Args:
        nfe: steps of the uncached reference; the method may take fewer.
        prompts: sample indices [n] -> what they shall show; without it, class labels in turn.
        path: `plain` is the engine with the model's own layers; `fused` the fastest way to execute the same plans.

    Attributes:
        nfe: steps that the method takes.
        macs: the ledger's totals per sample (`Ledger.totals`).
        step_macs: MACs per sample of every step, all overheads charged.
        reads: numbers that the host waits for in a run.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Method,
        nfe: int,
        settings: SamplerSettings,
        sample_index: Tensor,
        artefacts: Artefacts | None = None,
        *,
        prompts: Prompts | None = None,
        path: ExecutionPath = "fused",
    ) -> None:
        self._adapter, self._method, self._settings, self._path = adapter, method, settings, path
        self._index = sample_index
        _, self._run = start_run(adapter, method, nfe, settings, sample_index, artefacts or Artefacts())
        device, dtype = adapter.device, adapter.dtype
        self._noise = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
        prompt = default_prompts(adapter, sample_index) if prompts is None else prompts(sample_index)
        self._prompt = prompt.to(device)
        # drawn on the host in the run ahead, and kept where a captured graph finds it
        self._draw = cache(
            lambda step: ancestral_noise(adapter, settings, sample_index, self.nfe, step).to(device, dtype)
        )
        self._steps: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
        self._next, self.nfe = 0, self._run.nfe
        self._graphs: list[list[_Segment]] = []  # by step
        self.reads = 0
        self.step_macs: list[int] = []
        with undisturbed(adapter, method, self._run.artefacts, self._run.sample_index):
            for step in range(self.nfe):  # one run ahead, which checks, counts, and compiles what needs compiling
                self._step(step)
                self.step_macs.append(self._macs["per_sample"] - sum(self.step_macs))
        self.macs = self._macs
        if path == "fused" and can_fuse(adapter):
            self._capture()

    @property
    def _macs(self) -> dict[str, Any]:
        return self._passes.macs

    def step(self, index: int) -> None:
        """Enqueue sampling step `index` without waiting for the device; 0 starts again.

        Raises:
            RuntimeError: a step was left out.
        """
        with values_unchecked():
            self._step(index)

    @torch.inference_mode()
    def _step(self, index: int) -> None:
        if index and index != self._next:
            raise RuntimeError(f"step {index} was asked for after step {self._next - 1}; steps follow each other")
        self._next = index + 1
        if self._graphs:
            for segment in self._graphs[index]:
                segment.replay(self._method.name, index)
            return
        if index == 0:
            self._begin()
        _, _, self._latents = next(self._steps)

    def run(self) -> Tensor:
        """All steps from the first: the final latents, [n, C, H, W]."""
        for step in range(self.nfe):
            self.step(step)
        return self._latents

    def _read(self, value: Tensor) -> float:
        self.reads += 1
        return value.item()

    def _begin(self) -> None:
        blocks = FusedBlocks if self._path == "fused" and can_fuse(self._adapter) else PlainBlocks
        self._passes, self.reads = Passes(self._adapter, self._run, self._method.start, blocks), 0
        for engine in self._passes.engines:
            engine.read = self._read
        # a fresh one, because multistep samplers remember
        sampler = make_sampler(self._adapter, self.nfe, self._settings, self._index, self._draw)
        self._steps = denoise(self._passes, sampler, self._noise, self._prompt)

    @torch.inference_mode()
    @values_unchecked()
    def _capture(self) -> None:
        """Capture every step; the graphs share their memory, because they always run in this order."""
        graphs: list[list[_Segment]] = []
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        torch.cuda.synchronize()
        self._begin()

        def cut(value: Tensor) -> float:
            """End a graph where the host reads a number, run what there is, and go on in another."""
            self.reads += 1
            number = graphs[-1][-1].end(value)
            graphs[-1].append(_Segment(pool))
            return number

        for engine in self._passes.engines:
            engine.read = cut
        with torch.cuda.stream(stream):
            for _ in range(self.nfe):
                graphs.append([_Segment(pool)])
                _, _, self._latents = next(self._steps)
                # later reads need the values, so what is captured is run if there are any
                graphs[-1][-1].end(None, run=self._method.decides == "host")
        torch.cuda.synchronize()
        self._graphs = graphs


class _Segment:
    """A captured graph, and the number that the host reads at its end."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._value: Tensor | None = None
        self._number = 0.0
        self._graph.capture_begin(pool=pool)

    def end(self, value: Tensor | None, run: bool = True) -> float:
        """End the capture; the number, if one is read."""
        self._graph.capture_end()
        if run:
            self._graph.replay()
        if value is not None:
            self._value, self._number = value, value.item()
        return self._number

    def replay(self, method: str, step: int) -> None:
        """Run the graph, and wait for its number.

        Raises:
            RuntimeError: the number is another than when the graphs were captured, so they may have the wrong outcome.
        """
        self._graph.replay()
        if self._value is not None and self._value.item() != self._number:
            raise RuntimeError(f"{method}: step {step} read another number than when it was captured")
