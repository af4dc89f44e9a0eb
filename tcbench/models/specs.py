"""Which denoisers exist, and the one place that builds, loads and saves them; a family's own part is in its module."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.files import write_tensors
from tcbench.method import ModelShape
from tcbench.models.adapter import Adapter, Family, ModelSpec
from tcbench.models.dit import DIT, DiTSpec
from tcbench.models.open_sora_plan import OPEN_SORA_PLAN, OpenSoraPlanSpec
from tcbench.models.pixart import PIXART, PixArtSpec
from tcbench.models.weights import check_state, locate, read_state

FAMILIES: dict[str, Family] = {"dit": DIT, "pixart": PIXART, "open_sora_plan": OPEN_SORA_PLAN}


def _dit_xl_2(resolution: int) -> DiTSpec:
    return DiTSpec(
        name=f"dit-xl-2-{resolution}",
        num_blocks=28,
        num_heads=16,
        head_dim=72,
        sample_size=resolution // 8,
        in_channels=4,
        out_channels=8,
        num_classes=1000,
        guided_channels=3,
    )


def _pixart_xl_2(resolution: int) -> PixArtSpec:
    return PixArtSpec(
        name=f"pixart-{resolution}",
        num_blocks=28,
        num_heads=16,
        head_dim=72,
        sample_size=resolution // 8,
        in_channels=4,
        out_channels=8,
        guided_channels=4,
        caption_channels=4096,
        caption_tokens=120,
        sized=resolution == 1024,
    )


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        DiTSpec(
            name="digits-dit",
            num_blocks=14,
            num_heads=4,
            head_dim=16,
            sample_size=16,
            in_channels=1,
            out_channels=1,
            num_classes=10,
            guided_channels=1,
            weights="digits/denoiser.safetensors",
        ),
        DiTSpec(  # as deep as DiT-XL/2 and with as many tokens, so that shares of a step's MACs are the paper's
            name="fashion-dit",
            num_blocks=28,
            num_heads=3,
            head_dim=64,
            sample_size=32,
            in_channels=1,
            out_channels=1,
            num_classes=10,
            guided_channels=1,
        ),
        PixArtSpec(
            name="scenes-pixart",
            num_blocks=14,
            num_heads=4,
            head_dim=16,
            sample_size=24,
            in_channels=1,
            out_channels=1,
            guided_channels=1,
            caption_channels=64,
            caption_tokens=16,
            weights="scenes/denoiser.safetensors",
        ),
        OpenSoraPlanSpec(
            name="moving-osp",
            num_blocks=16,
            num_heads=3,
            head_dim=24,
            sample_frames=5,
            sample_height=16,
            sample_width=16,
            in_channels=1,
            out_channels=1,
            guided_channels=1,
            caption_channels=64,
            caption_tokens=16,
            dense_blocks=(0, 1, 14, 15),
            weights="moving/denoiser.safetensors",
        ),
        DiTSpec(
            name="tiny-dit",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_size=16,
            in_channels=4,
            out_channels=8,
            num_classes=10,
            guided_channels=3,
        ),
        PixArtSpec(
            name="tiny-pixart",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_size=16,
            in_channels=4,
            out_channels=8,
            guided_channels=4,
            caption_channels=32,
            caption_tokens=12,
        ),
        OpenSoraPlanSpec(
            name="tiny-osp",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_frames=2,
            sample_height=16,
            sample_width=8,
            in_channels=4,
            out_channels=4,
            guided_channels=4,
            caption_channels=32,
            caption_tokens=12,
            dense_blocks=(0, 3),
        ),
        _dit_xl_2(256),
        _dit_xl_2(512),
        _pixart_xl_2(256),
        _pixart_xl_2(1024),
        OpenSoraPlanSpec(  # v1.3.0, 93 frames of 256 x 256
            name="osp-93x256",
            num_blocks=32,
            num_heads=24,
            head_dim=96,
            sample_frames=24,
            sample_height=32,
            sample_width=32,
            in_channels=8,
            out_channels=8,
            guided_channels=8,
            caption_channels=4096,
            caption_tokens=512,
            dense_blocks=(0, 1, 30, 31),
            null_caption=False,
        ),
    )
}
"""The known models by name."""


def shape_of(spec: ModelSpec) -> ModelShape:
    """The shape of a model, without building it."""
    return FAMILIES[spec.family].shape(spec)


def make_adapter(model: nn.Module, spec: ModelSpec) -> Adapter:
    """A built model as the engine sees it."""
    return FAMILIES[spec.family].adapter(model, spec)


def build_transformer(
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    zero_init: bool = True,
) -> nn.Module:
    """Build the denoiser with random weights, in eval mode.

    Args:
        spec: the model's shape.
        device: on "meta" nothing is allocated and no weight has a value.
        dtype: of parameters and buffers.
        seed: of the weights, drawn on the CPU so that they do not depend on `device`; None draws them from
            torch's global generator.
        zero_init: True gives the reference's initialisation, in which an untrained model returns 0 whatever its blocks
            do. False draws every layer, and the output visibly depends on timestep, prompt and each block: for tests
            and for timing.

    Returns:
        diffusers' class of the family; `Adapter.plain` calls it.
    """
    family = FAMILIES[spec.family]
    model = family.skeleton(spec)
    if torch.device(device).type == "meta":
        return nn.Module.to(model, device="meta", dtype=dtype)
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    state = {
        name: family.initial_value(name, parameter.shape, generator, zero_init)
        for name, parameter in model.named_parameters()
    }
    return _fill(model, state, device, dtype)


def load_transformer(
    spec: ModelSpec,
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load a trained denoiser, in eval mode, from `weights` or else from `spec.weights`.

    Reads .safetensors, or .pt / .pth / .bin without executing anything in them, in diffusers' layout or in the layout
    of the family's reference code.

    Raises:
        UserError: no weights are named, or the file is missing, truncated, lacks a tensor, holds an unknown
            one, or holds one of the wrong shape or with a value that is not finite.
    """
    weights = weights if weights is not None else spec.weights
    if weights is None:
        raise UserError(f"{spec.name}: this model ships without weights; give the path of a checkpoint as `weights`")
    path, family = locate(weights), FAMILIES[spec.family]
    state = family.to_diffusers(read_state(path), path)
    model = family.skeleton(spec)
    check_state(state, model, spec.name, path)
    return _fill(model, state, device, dtype)


def save_transformer(model: nn.Module, path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write the weights as safetensors in diffusers' layout, what modules share once (under its first name)."""
    # named_parameters lists a shared parameter once, under its first name; state_dict would list every alias
    write_tensors(Path(path), {name: p.detach().cpu() for name, p in model.named_parameters()}, metadata)


def _fill(model: nn.Module, state: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    # strict=False: aliases of what modules share are absent from `state`, which is complete otherwise
    model.load_state_dict(state, strict=False, assign=True)
    # not model.to: diffusers' override warns about keeping an empty list of modules in float32
    return nn.Module.to(model, device=device, dtype=dtype)
