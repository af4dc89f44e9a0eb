"""One batch's run prepared once and repeated without the host deciding anything: for timing, and for many batches."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from tcbench.engine import PlainBlocks
from tcbench.fused import FusedBlocks, can_fuse
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter
from tcbench.sampling import (
    Passes,
    Prompts,
    SamplerSettings,
    ancestral_noise,
    default_prompts,
    denoise,
    initial_noise,
    make_sampler,
    start_run,
)

ExecutionPath = Literal["fused", "plain"]


class Replay:
    """A run that can be repeated step by step; every repetition starts from the same noise and an empty cache.

    With fused blocks on a GPU every step is a captured CUDA graph. A method's decisions are captured with it: they are
    kernels that read the current latents, and nothing of a plan that the host knows depends on a sample.

    Args:
        nfe: steps of the uncached reference; the method may take fewer.
        prompts: sample indices [n] -> what they shall show; without it, class labels in turn.
        path: `plain` is the engine with the model's own layers; `fused` the fastest way to execute the same plans.

    Attributes:
        nfe: steps that the method takes.
        macs: the ledger's totals per sample (`Ledger.totals`).
        step_macs: MACs per sample of every step, all overheads charged.
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
        self._draw = cache(lambda step: ancestral_noise(adapter, settings, sample_index, step).to(device, dtype))
        self._steps: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
        self._next = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.nfe = self._run.nfe
        self.step_macs: list[int] = []
        for step in range(self.nfe):  # one run ahead, which counts, and compiles what needs compiling
            self.step(step)
            self.step_macs.append(self._macs["per_sample"] - sum(self.step_macs))
        self.macs = self._macs
        if path == "fused" and can_fuse(adapter):
            self._capture()

    @property
    def _macs(self) -> dict[str, Any]:
        return self._passes.macs

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue sampling step `index` without waiting for the device; 0 starts again.

        Raises:
            RuntimeError: a step was left out.
        """
        if index and index != self._next:
            raise RuntimeError(f"step {index} was asked for after step {self._next - 1}; steps follow each other")
        self._next = index + 1
        if self._graphs:
            self._graphs[index].replay()
            return
        if index == 0:
            self._begin()
        _, _, self._latents = next(self._steps)

    def run(self) -> Tensor:
        """All steps from the first: the final latents, [n, C, H, W]."""
        for step in range(self.nfe):
            self.step(step)
        return self._latents

    def _begin(self) -> None:
        blocks = FusedBlocks if self._path == "fused" and can_fuse(self._adapter) else PlainBlocks
        self._passes = Passes(self._adapter, self._run, self._method.start, blocks)
        # a fresh one, because multistep samplers remember
        sampler = make_sampler(self._adapter, self.nfe, self._settings, self._index, self._draw)
        self._steps = denoise(self._passes, sampler, self._noise, self._prompt)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Capture every step; the graphs share their memory, because they always run in this order."""
        graphs, pool, stream = [], torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        torch.cuda.synchronize()
        self._begin()
        with torch.cuda.stream(stream):
            for _ in range(self.nfe):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                _, _, self._latents = next(self._steps)
                graph.capture_end()
                graphs.append(graph)
        torch.cuda.synchronize()
        self._graphs = graphs
