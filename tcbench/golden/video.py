"""Open-Sora-Plan's denoiser and WF-VAE against outputs of the reference code (docs/goldens.md)."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Text
from tcbench.models.networks import load_transformer, make_adapter
from tcbench.models.specs import SPARSE_GROUPS, OpenSoraPlanSpec
from tcbench.models.wf_vae import (
    SPACE_HAAR,
    SPACE_TIME_HAAR,
    WFVAE,
    Haar,
    InverseHaar,
    Slice,
    build_wf_vae,
    read_config,
    to_bytes,
    weights_in,
)
from tcbench.record.files import read_json, read_tensors
from tcbench.registry import make_method
from tcbench.samplers import EulerAncestral
from tcbench.sampling import Passes, denoise

if TYPE_CHECKING:
    from tcbench.golden.case import Case


FRAMES = {"frames": 1.0, "frames_that_differ": 1e-3}
"""Bytes are cut off, and a value near a whole level falls either way: by how many levels, in which share of them."""

PARTS = {
    "W3(video)": "encoder.wavelet_in",
    "encoder.W2": "encoder.wavelet_l1",
    "encoder.W3_l2": "encoder.wavelet_l2",
    "decoder.W3inv_l2": "decoder.wavelet_l2",
    "decoder.W2inv_l1": "decoder.wavelet_l1",
}
"""Our names of parts that have none in a checkpoint."""

SHOWN = 16  # what is wider or higher is cut in a case of parts


def stated_tolerances(case: "Case") -> dict[str, float]:
    """The tolerances in the case's own `quantities`, and those of bytes."""
    try:
        stated = {name: entry["tolerance"] for name, entry in case.setting("quantities").items()}
    except (AttributeError, KeyError, TypeError) as error:
        path = case.directory / f"{case.name}.json"
        raise UserError(f"{path}: quantities: not tolerances by quantity; see docs/goldens.md") from error
    return stated | FRAMES


def run_forward(case: "Case") -> dict[str, float]:
    """The network's output for captions and the negative one, by timestep."""
    timesteps, z = case.setting("timesteps"), case.expected["z"]
    ours = _outputs(case, _adapter(case), tuple(timesteps), [z] * len(timesteps))
    return {
        f"v_t{timestep}": _largest(output, case.expected[f"v_t{timestep}"])
        for timestep, output in zip(timesteps, ours, strict=True)
    }


@torch.inference_mode()
def run_sampling(case: "Case") -> dict[str, float]:
    """All steps from the noise; every step from what the network was shown, if the case stores it."""
    expected, adapter = case.expected, _adapter(case)
    sampler = EulerAncestral(int(case.number("steps")), lambda step: expected["noise"][step])
    run, prompt = _run(case, adapter, sampler.timesteps, case.number("cfg_scale"))
    passes = Passes(adapter, run, make_method("uncached", {}).start)
    *_, (_, _, latent) = denoise(passes, sampler, expected["z"], prompt)
    errors = {
        "timesteps": max(abs(a - b) for a, b in zip(sampler.timesteps, case.setting("timesteps"), strict=True)),
        "latent_free_running": _largest(latent, expected["latent"]),
    }
    if "x" not in expected:
        return errors
    outputs = _outputs(case, adapter, sampler.timesteps, expected["x"])
    stepped = [
        sampler.step(run.guidance.combine([output]), step, expected["x"][step])[0]
        for step, output in enumerate(outputs)
    ]
    return errors | {
        "v": _largest(torch.stack(outputs), torch.cat([expected["v_cond"], expected["v_uncond"]], dim=1)),
        "x_next": _largest(torch.stack(stepped), expected["x_next"]),
    }


def _adapter(case: "Case") -> Adapter:
    path = case.directory / "config.json"
    config = read_json(path)
    captions = _captions(case).states_RTC
    try:
        blocks = config["num_layers"]
        if not config["sparse1d"] or config["sparse_n"] != SPARSE_GROUPS:
            raise UserError(
                f"{path}: sparse_n: only networks that attend to one of {SPARSE_GROUPS} groups are run here"
            )
        spec = OpenSoraPlanSpec(
            name="golden",
            num_blocks=blocks,
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            patch_size=config["patch_size"],
            sample_frames=config["sample_size_t"],
            sample_height=config["sample_size_h"],
            sample_width=config["sample_size_w"],
            in_channels=config["in_channels"],
            out_channels=config["in_channels"],
            guided_channels=config["in_channels"],
            caption_channels=config["caption_channels"],
            caption_tokens=captions.shape[1],
            dense_blocks=(0, 1, blocks - 2, blocks - 1),
            null_caption=False,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]} missing or wrong; see docs/goldens.md") from error
    return make_adapter(load_transformer(spec, case.directory), spec)


def _captions(case: "Case") -> Text:
    """What all cases of a directory show, from the one that stores it."""
    tensors = read_tensors(case.directory / "forward.safetensors")[0]
    try:
        negative = Text(tensors["negative"][:, 0], tensors["negative_mask"].bool())
        return Text(tensors["caption"][:, 0], tensors["caption_mask"].bool(), negative)
    except KeyError as error:
        raise UserError(f"{case.directory / 'forward.safetensors'}: no tensor {error}; see docs/goldens.md") from error


def _run(case: "Case", adapter: Adapter, timesteps: tuple[float, ...], scale: float = 1.0) -> tuple[Run, Text]:
    prompt = _captions(case)
    return Run(adapter.shape, timesteps, adapter.spec.guidance(scale), torch.arange(len(prompt))), prompt


@torch.inference_mode()
def _outputs(
    case: "Case", adapter: Adapter, timesteps: tuple[float, ...], latents: "list[Tensor] | Tensor"
) -> list[Tensor]:
    """The network's output for both halves of the guided batch, at every timestep for its own latents."""
    run, prompt = _run(case, adapter, timesteps)
    engine = Engine(adapter, run, make_method("uncached", {}).start(run))
    (rows,) = run.guidance.prompts(adapter, prompt)
    context = engine.prepare(rows)
    return [engine(step, run.guidance.latents(latents[step]), context) for step in range(len(timesteps))]


def run_autoencoder(case: "Case") -> dict[str, float]:
    """Posterior, latent and video of whole videos and of the thinnest slices, whichever is further off."""
    vae, expected = _autoencoder(case), case.expected
    scale, shift = (
        torch.tensor(by_channel)[:, None, None, None] for by_channel in (vae.config.scale, vae.config.shift)
    )
    errors: dict[str, float] = {}
    for at_once in (None, 1):
        mean, log_variance = vae.encode(expected["video"], at_once)
        decoded = vae.decode(expected["z"] / scale + shift, at_once)
        ours = {
            "mean": mean,
            "logvar": log_variance,
            "latent": (mean + torch.exp(log_variance / 2) * expected["noise"] - shift) * scale,
            "decoded": decoded,
            "frames": to_bytes(decoded),
        }
        found = {name: _largest(tensor, expected[name]) for name, tensor in ours.items()}
        found["frames_that_differ"] = (ours["frames"] != expected["frames"]).float().mean().item()
        errors = {name: max(error, errors.get(name, 0.0)) for name, error in found.items()}
    return errors


def run_parts(case: "Case") -> dict[str, float]:
    """What every part returned in another case of the directory, the one that `of` names."""
    named = re.match(r"(\w+):", str(case.setting("of")))
    if not named:
        raise UserError(f"{case.directory / case.name}.json: of: names no case ('nine_frames: ...')")
    inputs, vae = read_tensors(case.directory / f"{named[1]}.safetensors")[0], _autoencoder(case)
    returned: dict[str, Tensor] = {}

    def remember(name: str) -> None:
        # a copy, because what a part returns is added to
        vae.get_submodule(PARTS.get(name, name)).register_forward_hook(
            lambda _, __, output: returned.update({name: output.movedim(-1, 1).clone()})
        )

    for name in case.expected:
        remember(name)
    vae.encode(inputs["video"])
    vae.decode(inputs["z"] / torch.tensor(vae.config.scale)[:, None, None, None])
    return {name: _largest(returned[name][..., :SHOWN, :SHOWN], tensor) for name, tensor in case.expected.items()}


def run_wavelets(case: "Case") -> dict[str, float]:
    """The transforms alone, there and back."""
    ramp = case.expected["ramp"].movedim(1, -1)
    ours: dict[str, Tensor] = {}
    for number, how in (("3", SPACE_TIME_HAAR), ("2", SPACE_HAAR)):
        subbands = Haar(*how)(ramp, Slice())
        ours |= {f"W{number}": subbands, f"W{number}inv_of_W{number}": InverseHaar(*how)(subbands, Slice())}
    return {name: _largest(tensor.movedim(-1, 1), case.expected[name]) for name, tensor in ours.items()}


def _autoencoder(case: "Case") -> WFVAE:
    path = case.directory / "weights.safetensors"
    return build_wf_vae(read_config(case.directory / "config.json"), weights_in(read_tensors(path)[0], path))


def _largest(ours: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; raises UserError where shapes differ."""
    if ours.shape != expected.shape:
        raise UserError(
            f"shape {list(ours.shape)} computed, {list(expected.shape)} expected; check the case's settings"
        )
    return (ours.double() - expected.double()).abs().max().item()
