"""What the blocks of every step are modulated by, made when a run starts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tcbench.method import Run
from tcbench.models.adapter import Adapter, Gated, rows_of
from tcbench.models.text_adapter import Cross


class Ahead:
    """Conditions and modulation of all steps at once: they depend on timesteps and prompts alone.

    Weights that modulate are then read once a run, not once a step. It is made before a run is captured, because
    timesteps come from the host; what `prepare` does is captured.
    """

    def __init__(self, adapter: Adapter, run: Run) -> None:
        self._adapter, self._rows = adapter, len(run.sample_index) * run.rows_per_sample
        timesteps = torch.tensor(run.timesteps, device=adapter.device)
        self._timestep_R = timesteps.repeat_interleave(self._rows)  # a step's rows behind those of the one before

    def prepare(self, context: Any) -> None:
        """Make them, with the run's context (`Adapter.prepare`)."""
        self._condition = self._adapter.condition(self._timestep_R, context)
        self._modulation = [self._adapter.modulation(module, self._condition) for module in self._adapter.blocks]
        self._final = self._adapter.final_modulation(self._condition)

    def condition(self, step: int) -> Any:
        """What conditions the rows at a step (`Adapter.condition`)."""
        return self._condition[self._at(step)]

    def modulation(self, step: int, block: int) -> Mapping[str, Gated]:
        """What the block's parts need at a step (`Adapter.modulation`); the text is the same at all."""
        parts, rows = self._modulation[block].items(), self._at(step)
        return {part: gated if isinstance(gated, Cross) else rows_of(gated, rows) for part, gated in parts}

    def final(self, step: int) -> tuple[Tensor, ...]:
        """(shift, scale) before the final layer at a step (`Adapter.final_modulation`)."""
        return tuple(whole[self._at(step)] for whole in self._final)

    def _at(self, step: int) -> slice:
        return slice(step * self._rows, (step + 1) * self._rows)
