"""One batch's run prepared once and repeated, for timing."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from tcbench.engine import Engine, PlainBlocks
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter
from tcbench.sampling import Prompts, SamplerSettings, default_prompts, denoise, initial_noise, make_sampler, start_run

ExecutionPath = Literal["fused", "plain"]


class Replay:
    """A run that can be repeated step by step; every repetition starts from the same noise and an empty cache.

    Args:
        nfe: steps of the uncached reference; the method may take fewer.
        prompts: sample indices [n] -> what they shall show; without it, class labels in turn.
        path: `fused` is the fastest way to execute plans that there is; `plain` calls the layers of the model.

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
        self._adapter, self._method, self._settings = adapter, method, settings
        self._index = sample_index
        _, self._run = start_run(adapter, method, nfe, settings, sample_index, artefacts or Artefacts())
        device, dtype = adapter.model.device, adapter.model.dtype
        self._noise = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
        prompt = default_prompts(adapter, sample_index) if prompts is None else prompts(sample_index)
        self._prompt = prompt.to(device)
        self._blocks = PlainBlocks if path == "plain" else None
        self._steps: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
        self._next = 0
        self.nfe = self._run.nfe
        self.step_macs: list[int] = []
        for step in range(self.nfe):  # one run ahead, which counts
            self.step(step)
            self.step_macs.append(self._macs["per_sample"] - sum(self.step_macs))
        self.macs = self._macs

    @property
    def _macs(self) -> dict[str, Any]:
        return self._engine.ledger.totals()

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Enqueue sampling step `index` without waiting for the device; 0 starts again.

        Raises:
            RuntimeError: a step was left out.
        """
        if index == 0:
            self._engine = Engine(self._adapter, self._run, self._method.start(self._run), self._blocks)
            sampler = make_sampler(self._adapter, self.nfe, self._settings, self._index)  # multistep ones remember
            self._steps = denoise(self._adapter, self._engine, sampler, self._settings, self._noise, self._prompt)
        elif index != self._next:
            raise RuntimeError(f"step {index} was asked for after step {self._next - 1}; steps follow each other")
        _, _, self._latents = next(self._steps)
        self._next = index + 1

    def run(self) -> Tensor:
        """All steps from the first: the final latents, [n, C, H, W]."""
        for step in range(self.nfe):
            self.step(step)
        return self._latents
