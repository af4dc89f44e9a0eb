"""The one place that builds, loads and saves networks; a family's own part is the module of its name."""

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.models.adapter import Adapter, Family
from tcbench.models.specs import ModelSpec
from tcbench.models.weights import check_finite, check_shapes, read_state
from tcbench.outside.places import locate
from tcbench.record.files import write_tensors

FAMILIES = {
    "dit": "tcbench.models.dit",
    "pixart": "tcbench.models.pixart",
    "open_sora_plan": "tcbench.models.open_sora_plan",
    "flux": "tcbench.models.flux",
    "wan": "tcbench.models.wan",
}
"""Where each family's `FAMILY` is; a module is imported when its family is first asked for."""


def family_of(spec: ModelSpec) -> Family:
    """How the spec's family is built and seen."""
    return import_module(FAMILIES[spec.family]).FAMILY


def make_adapter(model: nn.Module, spec: ModelSpec) -> Adapter:
    """A built model as the engine sees it."""
    return family_of(spec).adapter(model, spec)


def build_transformer(
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    zero_init: bool = True,
    drawn_there: bool = False,
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
        drawn_there: draw on `device` instead: a CPU takes minutes for the billions of FLUX.1.

    Returns:
        diffusers' class of the family; `Adapter.plain` calls it.
    """
    family = family_of(spec)
    model = family.skeleton(spec)
    if torch.device(device).type == "meta":
        return _placed(model, device, dtype)
    where = device if drawn_there else "cpu"
    generator = torch.default_generator if seed is None else torch.Generator(where).manual_seed(seed)
    state = {
        # each in its dtype at once: a large model in float32 is twice its memory
        name: family.initial_value(name, parameter.shape, generator, zero_init).to(_dtype_of(model, name, dtype))
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
    path = locate(weights)
    return fill_transformer(spec, read_state(path), path, device, dtype)


def fill_transformer(
    spec: ModelSpec,
    state: dict[str, Tensor],
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A denoiser with weights that were read from `path`, in eval mode; layouts and errors as `load_transformer`."""
    family = family_of(spec)
    state = family.to_diffusers(state, path)
    model = family.skeleton(spec)
    check_shapes(state, model, spec.name, path)

    def moved(name: str, tensor: Tensor) -> Tensor:
        # checked and cast on the device: a core takes a minute for the billions of FLUX.1
        there = tensor.to(device)
        check_finite(name, there, path)
        return there.to(_dtype_of(model, name, dtype))

    return _fill(model, {name: moved(name, tensor) for name, tensor in state.items()}, device, dtype)


def save_transformer(
    model: nn.Module,
    path: Path | str,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the weights in `dtype` as safetensors in diffusers' layout; what modules share is written once."""
    # named_parameters lists a shared parameter once, under its first name; state_dict would list every alias
    write_tensors(Path(path), {name: p.detach().cpu().to(dtype) for name, p in model.named_parameters()}, metadata)


def _fill(model: nn.Module, state: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    # strict=False: aliases of what modules share are absent from `state`, which is complete otherwise
    model.load_state_dict(state, strict=False, assign=True)
    return _placed(model, device, dtype)


def _placed(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A network on a device, in a dtype; what diffusers keeps in float32 when it loads the class stays there."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(_dtype_of(model, name, dtype))
    # not model.to: diffusers' override warns about modules in float32, even where there are none
    return nn.Module.to(model, device=device)


def _dtype_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter or buffer, in a network of `dtype`."""
    in_float32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if dtype.itemsize < 4 and any(part in name for part in in_float32) else dtype
