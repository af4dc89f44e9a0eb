"""What diffusers' pipelines do around their transformers, an entry each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.guidance import Guidance, TwoPasses, Unguided
from tcbench.models.adapter import Prompt, Text
from tcbench.models.flux import pack, token_places, unpack
from tcbench.models.specs import FluxSpec, ModelSpec, PixArtSpec

Arguments = Mapping[str, Any]
"""Of a call, by name."""


def _guided_above_one(spec: ModelSpec, called: Arguments) -> Guidance:
    return spec.guidance() if called["guidance_scale"] > 1 else Unguided()


def _with_captions_of(spec: ModelSpec, inputs: Arguments) -> ModelSpec:
    """The spec with as many caption tokens as the call has."""
    states = inputs.get("encoder_hidden_states")
    return spec if states is None else spec.model_copy(update={"caption_tokens": states.shape[1]})


def _as_they_are(spec: ModelSpec, x: Tensor) -> Tensor:
    return x


def _the_schedulers(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    return timesteps


def _nothing(pipe: Any, spec: ModelSpec, inputs: Arguments) -> None:
    """There is nothing to check."""


@dataclass(frozen=True)
class Habits:
    """What a pipeline does around its transformer.

    Attributes:
        prompt: the transformer's arguments -> what its rows show, in the pipeline's order; of every pass that guidance
            makes, the same in a whole call.
        unconditional_first: a guided pair shares a batch as [uncond; cond]; tcbench's order is [cond; uncond].
        guidance: (spec, the pipeline's own arguments) -> how it guides; passes come one after the other in every step.
        sized: (spec, the transformer's arguments) -> the spec at the call's sizes.
        latents, returned: (spec, the transformer's latents or output) -> as the adapter has them, and back.
        told: (the scheduler's timesteps, the latents' dtype) -> what the transformer is told of them.
        check: (pipeline, spec, the transformer's arguments) raises UserError at what the adapter would compute
            otherwise.
    """

    prompt: Callable[[Arguments], Prompt]
    unconditional_first: bool = False
    guidance: Callable[[ModelSpec, Arguments], Guidance] = _guided_above_one
    sized: Callable[[ModelSpec, Arguments], ModelSpec] = _with_captions_of
    latents: Callable[[Any, Tensor], Tensor] = _as_they_are
    returned: Callable[[Any, Tensor], Tensor] = _as_they_are
    told: Callable[[Tensor, torch.dtype], Tensor] = _the_schedulers
    check: Callable[[Any, ModelSpec, Arguments], None] = _nothing


# --- DiT and PixArt-alpha


def _labels(inputs: Arguments) -> Prompt:
    return inputs["class_labels"]


def _captions(inputs: Arguments) -> Prompt:
    return Text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"].bool())


def _told_its_own_size(pipe: Any, spec: ModelSpec, inputs: Arguments) -> None:
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


# --- FLUX.1


def _every_token(inputs: Arguments, **more: Any) -> Text:
    """Captions of which padding is read as any token."""
    states = inputs["encoder_hidden_states"]
    return Text(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device), **more)


def _flux_prompt(inputs: Arguments) -> Prompt:
    guidance = inputs.get("guidance")
    scale = None if guidance is None else guidance.flatten()[0].item()
    return _every_token(inputs, pooled_RC=inputs["pooled_projections"], guidance_scale=scale)


def _flux_guidance(spec: ModelSpec, called: Arguments) -> Guidance:
    """The network's own; with a negative prompt and true_cfg_scale, in two passes besides."""
    embedded = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    negative = called["negative_prompt"] is not None or all(called[name] is not None for name in embedded)
    return TwoPasses() if called["true_cfg_scale"] > 1 and negative else spec.guidance()


def _flux_size(spec: ModelSpec, inputs: Arguments) -> ModelSpec:
    places = inputs["img_ids"]
    rows, columns = (int(side) + 1 for side in places.reshape(-1, 3)[-1, 1:].tolist())
    sides = {"sample_height": rows * spec.patch_size, "sample_width": columns * spec.patch_size}
    return _with_captions_of(spec, inputs).model_copy(update=sides)


def _flux_check(pipe: Any, spec: ModelSpec, inputs: Arguments) -> None:
    assert isinstance(spec, FluxSpec)
    x, text, image = inputs["hidden_states"], inputs["txt_ids"], inputs["img_ids"]
    if x.dtype == torch.float16:
        raise UserError("FluxPipeline: diffusers cuts activations off in float16, and tcbench does not; use bfloat16")
    expected = token_places(spec, x.device)
    if text.ndim != 2 or any(map(_differ, (text, image), expected)):
        raise UserError("FluxPipeline: its tokens have other positions than text-to-image has; tcbench serves that")
    extra = ("joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples")
    if given := [name for name in extra if inputs.get(name)]:
        raise UserError(f"FluxPipeline: gives its transformer {given[0]}, which tcbench does not serve; leave it out")


def _differ(places: Tensor, expected: Tensor) -> bool:
    return not torch.equal(places.to(expected.dtype), expected)


def _told_sigma(timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    return timesteps.to(dtype) / 1000


_FLUX = Habits(
    _flux_prompt,
    guidance=_flux_guidance,
    sized=_flux_size,
    latents=lambda spec, x: unpack(x, spec),
    returned=lambda spec, x: pack(x, spec.patch_size),
    told=_told_sigma,
    check=_flux_check,
)


# --- Wan 2.1


def _wan_size(spec: ModelSpec, inputs: Arguments) -> ModelSpec:
    frames, height, width = inputs["hidden_states"].shape[2:]
    sides = {"sample_frames": frames, "sample_height": height, "sample_width": width}
    return _with_captions_of(spec, inputs).model_copy(update=sides)


def _wan_check(pipe: Any, spec: ModelSpec, inputs: Arguments) -> None:
    if pipe.config.get("boundary_ratio") is not None or inputs["timestep"].ndim != 1:
        raise UserError("WanPipeline: is a Wan 2.2 (two transformers, or a timestep per token); tcbench serves Wan 2.1")
    extra = ("encoder_hidden_states_image", "attention_kwargs")
    if given := [name for name in extra if inputs.get(name) is not None]:
        raise UserError(f"WanPipeline: gives its transformer {given[0]}, which tcbench does not serve; leave it out")


_WAN = Habits(_every_token, sized=_wan_size, check=_wan_check)


PIPELINES: dict[str, Habits] = {
    "DiTPipeline": Habits(_labels),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "FluxPipeline": _FLUX,
    "WanPipeline": _WAN,
}
"""By the name of the class whose `__call__` runs."""
