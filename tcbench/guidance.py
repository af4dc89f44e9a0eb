"""Guidance: how many rows a sample has in the transformer's batch, what they show, and what their outputs combine to.

A *pass* is one run of the transformer at a step. A guided pair shares one pass, or has a pass for each half; a model
that was distilled reads the scale as an input and needs neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:  # costing must not pay for importing torch
    from torch import Tensor


class Conditioned(Protocol):
    """The adapter, as guidance sees it."""

    def guided(self, prompt: Any) -> Any:
        """The prompt's rows, then as many unconditional ones."""

    def null(self, prompt: Any) -> Any:
        """Unconditional rows, as many as the prompt has."""


@dataclass(frozen=True)
class Guidance(ABC):
    """How the prediction for a sample is made from the model's outputs.

    Attributes:
        scale: of guidance; 1 adds nothing, but is computed all the same, as the references do.
        channels: guidance acts on the first this-many channels of the prediction; None on all.
    """

    scale: float = 1.0
    channels: int | None = None

    rows_per_sample: ClassVar[int] = 1
    """In the batch of a pass."""
    passes: ClassVar[int] = 1

    @property
    def rows(self) -> int:
        """Of a sample, over all passes."""
        return self.rows_per_sample * self.passes

    def prompts(self, adapter: Conditioned, prompt: Any) -> list[Any]:
        """What the rows show, by pass, for samples that show `prompt`."""
        return [prompt]

    def latents(self, x: "Tensor") -> "Tensor":
        """The rows' latents [R, C, ...], from the samples' [n, C, ...]; the same in every pass."""
        return x

    @abstractmethod
    def combine(self, outputs: "Sequence[Tensor]") -> "Tensor":
        """The prediction [n, C, ...] from the rows' predictions, [R, C, ...] by pass."""

    def _guided(self, conditional: "Tensor", unconditional: "Tensor") -> "Tensor":
        import torch

        guided = torch.lerp(unconditional[:, : self.channels], conditional[:, : self.channels], self.scale)
        if self.channels is None:
            return guided
        return torch.cat([guided, conditional[:, self.channels :]], dim=1)


class Unguided(Guidance):
    """One row, whose output is the prediction."""

    def combine(self, outputs: "Sequence[Tensor]") -> "Tensor":
        """The output."""
        return outputs[0]


class GuidedPair(Guidance):
    """Classifier-free guidance with both halves in one batch, [cond; uncond] (Ho and Salimans 2022)."""

    rows_per_sample = 2

    def prompts(self, adapter: Conditioned, prompt: Any) -> list[Any]:
        """The prompt, then unconditional rows."""
        return [adapter.guided(prompt)]

    def latents(self, x: "Tensor") -> "Tensor":
        """Both halves start from the same latent."""
        return x.repeat(2, *[1] * (x.ndim - 1))

    def combine(self, outputs: "Sequence[Tensor]") -> "Tensor":
        """From the unconditional half towards the conditional one, `scale` times their distance."""
        return self._guided(*outputs[0].chunk(2))


class TwoPasses(Guidance):
    """Classifier-free guidance with a pass for each half, as Wan samples; each half has caches and plans of its own."""

    passes = 2

    def prompts(self, adapter: Conditioned, prompt: Any) -> list[Any]:
        """The prompt in the first pass, unconditional rows in the second."""
        return [prompt, adapter.null(prompt)]

    def combine(self, outputs: "Sequence[Tensor]") -> "Tensor":
        """As a pair's."""
        return self._guided(*outputs)


class Distilled(Guidance):
    """The network was trained to guide itself: it reads the scale (FLUX.1-dev)."""

    def prompts(self, adapter: Conditioned, prompt: Any) -> list[Any]:
        """The prompt and the scale."""
        return [replace(prompt, guidance_scale=self.scale)]

    def combine(self, outputs: "Sequence[Tensor]") -> "Tensor":
        """The output."""
        return outputs[0]


GuidanceKind = Literal["none", "pair", "two_passes", "distilled"]
GUIDANCE: dict[GuidanceKind, type[Guidance]] = {
    "none": Unguided,
    "pair": GuidedPair,
    "two_passes": TwoPasses,
    "distilled": Distilled,
}
