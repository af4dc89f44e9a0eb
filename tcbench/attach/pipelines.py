"""What diffusers' pipelines do around their transformers, an entry each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tcbench.errors import UserError
from tcbench.models.adapter import Prompt, Text
from tcbench.models.specs import ModelSpec, PixArtSpec

Arguments = Mapping[str, Any]
"""Of a call, by name."""


def _scale_above_one(called: Arguments) -> bool:
    return called["guidance_scale"] > 1


def _nothing(spec: ModelSpec, inputs: Arguments) -> None:
    """There is nothing to check."""


@dataclass(frozen=True)
class Habits:
    """What a pipeline does around its transformer.

    Attributes:
        prompt: the transformer's arguments -> what its rows show, in the pipeline's order; the same in a whole call.
        unconditional_first: a guided pair shares a batch as [uncond; cond]; tcbench's order is [cond; uncond].
        guided: the pipeline's own arguments -> whether it guides.
        check: (spec, the transformer's arguments) raises UserError at what the adapter would compute otherwise.
    """

    prompt: Callable[[Arguments], Prompt]
    unconditional_first: bool = False
    guided: Callable[[Arguments], bool] = _scale_above_one
    check: Callable[[ModelSpec, Arguments], None] = _nothing


def _labels(inputs: Arguments) -> Prompt:
    return inputs["class_labels"]


def _captions(inputs: Arguments) -> Prompt:
    return Text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"].bool())


def _told_its_own_size(spec: ModelSpec, inputs: Arguments) -> None:
    assert isinstance(spec, PixArtSpec)
    if not spec.sized:
        return
    pixels = inputs["added_cond_kwargs"]["resolution"]
    if pixels is None or not (pixels == 8 * spec.sample_size).all():
        raise UserError(
            f"the pipeline tells its transformer another image size than {8 * spec.sample_size} x "
            f"{8 * spec.sample_size} pixels; tcbench serves the transformer's own size, with 8 pixels to a latent"
        )


_PIXART = Habits(_captions, unconditional_first=True, check=_told_its_own_size)

PIPELINES: dict[str, Habits] = {
    "DiTPipeline": Habits(_labels),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}
"""By the name of the class whose `__call__` runs."""
