"""Toy versions of the files that paper suites name, each in the layout of the official one (tcbench.rehearse.layouts).

`write_files` writes what a config lists, where the config says; `small_suite` makes the config itself small.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.metrics import image_reward
from tcbench.models.networks import build_transformer
from tcbench.models.specs import MODELS
from tcbench.models.wf_vae import WFVAE
from tcbench.rehearse import layouts
from tcbench.rehearse.layouts import (
    dit_layout,
    draw_image,
    grey,
    pixart_layout,
    random_denoiser,
    write_adm,
    write_alexnet,
    write_as_diffusers,
    write_coco_captions,
    write_coco_images,
    write_dit,
    write_dit_training,
    write_drawbench,
    write_imagenet,
    write_inception,
    write_mixkit,
    write_mixkit_captions,
    write_open_sora_plan,
    write_pixart,
    write_vbench,
    write_video,
)
from tcbench.rehearse.sizes import NOT_HERE, SPECS, TINY
from tests.references import image_reward as reference
from tests.suites import with_fields

__all__ = [
    "NOT_HERE", "SPECS", "build_transformer", "dit_layout", "draw_image", "grey", "pixart_layout", "random_denoiser",
    "write_adm", "write_dit", "write_dit_training", "write_imagenet", "write_inception", "write_open_sora_plan",
    "write_pixart", "write_video",
]  # fmt: skip

CONFIGS = sorted((Path(__file__).parent.parent / "config").glob("paper-*.yaml"))
CLIP, WF_VAE = TINY.clip, TINY.wf_vae


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the networks that suites name small: as small as the files here."""
    for name, spec in SPECS.items():
        monkeypatch.setitem(MODELS, name, spec)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14-quickgelu", CLIP)
    small = partial(image_reward.load_image_reward, **image_reward_sizes())
    monkeypatch.setattr(image_reward, "load_image_reward", small)


def small_suite(name: str, changes: Mapping[str, Any]) -> Suite:
    """A shipped config, written to mini.yaml with few samples and some fields changed; its files are where it says."""
    settings = yaml.safe_load(next(path for path in CONFIGS if path.stem == name).read_text(encoding="utf-8"))
    small = {
        "suite": "mini", "model.device": "cpu", "samples.count": 8, "samples.batch_size": 1, "samples.shard_batches": 2,
        "samples.traced": 2, "show.figure": {"nfe": 3, "columns": 3}, "show.tables": {},
        "latency": {"batch_size": 1, "warmup": 0, "repeats": 1}, "diagnostics.pairs": 2,
        "defaults": {}, "ablations": {}, "rivals": None,
    }  # fmt: skip
    settings = with_fields(with_fields(settings, small), changes)
    Path("mini.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_suite("mini.yaml")


def write_files(suite: Suite, without: Collection[str] = ()) -> None:
    """Write every file that a suite lists, at its path, `without` some entries.

    Raises:
        KeyError: the config lists a file that nothing here imitates.
    """
    paths = {name: suite.files[name].path.expanduser() for name in suite.files.keys() - set(without)}
    for name, path in [(name, path) for name, path in paths.items() if not path.exists()]:  # one may lie in another
        path.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[name](path, suite)


def write_t5(folder: Path) -> nn.Module:
    """The encoder that was written."""
    return layouts.write_t5(folder, TINY.text_encoder)


def write_mt5(folder: Path) -> nn.Module:
    """The encoder that was written."""
    return layouts.write_mt5(folder, TINY.text_encoder)


def write_autoencoder(folder: Path, pickled: bool = False) -> AutoencoderKL:
    """The autoencoder that was written."""
    return layouts.write_autoencoder(folder, TINY.autoencoder, pickled)


def write_wf_vae(folder: Path, **changed: Any) -> WFVAE:
    """The autoencoder that was written."""
    return layouts.write_wf_vae(folder, WF_VAE | changed)


@cache
def clip_archive() -> bytes:
    """As `layouts.clip_archive`, once."""
    return layouts.clip_archive(CLIP)


def write_clip(path: Path) -> None:
    """At toy size."""
    path.write_bytes(clip_archive())


def image_reward_sizes() -> dict[str, Any]:
    """The shapes that `write_image_reward` writes, as `load_image_reward` takes them."""
    return {"vision": TINY.vision, "text": TINY.text}


def write_image_reward(path: Path) -> list[float]:
    """The weights that the package's own rewards, returned, were recorded with."""
    recorded = json.loads((reference.HERE / "image_reward.json").read_text(encoding="utf-8"))
    state = {name: torch.from_numpy(reference.fill(name, shape)) for name, shape in recorded["parameters"].items()}
    layouts.write_image_reward(path, state, positions=64)
    return recorded["rewards"]


def write_vocabulary(folder: Path) -> None:
    """bert-base-uncased: the vocabulary that rewards were recorded with."""
    shutil.copytree(reference.HERE / "image_reward_vocabulary", folder)
    layouts.write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})


def _write_denoiser(path: Path, suite: Suite) -> None:
    spec = SPECS[suite.model.name]
    writers = {"dit": write_dit, "pixart": write_pixart, "open_sora_plan": write_open_sora_plan}
    writers.get(spec.family, write_as_diffusers)(path, random_denoiser(spec))


def write_flux_encoders(folder: Path) -> None:
    """FLUX.1-dev's, with few channels."""
    layouts.write_flux_encoders(folder, TINY.text_encoder, TINY.clip_text, TINY.dtype)


def write_wan_encoder(folder: Path) -> None:
    """Wan 2.1's, with few channels."""
    layouts.write_wan_encoder(folder, TINY.text_encoder, TINY.dtype)


def write_flux_autoencoder(folder: Path) -> AutoencoderKL:
    """FLUX.1-dev's, with few channels."""
    return layouts.write_flux_autoencoder(folder, TINY.flux_autoencoder)


def write_wan_autoencoder(folder: Path) -> AutoencoderKLWan:
    """Wan 2.1's, with few channels."""
    return layouts.write_wan_autoencoder(folder, TINY.wan_autoencoder)


def _write_text_encoder(path: Path, suite: Suite) -> None:
    if own := {"flux-dev": write_flux_encoders, "wan-1.3b": write_wan_encoder}.get(suite.model.name):
        own(path)
        return
    (write_mt5 if path.name.startswith("mt5") else write_t5)(path)


def _write_autoencoder(path: Path, suite: Suite) -> None:
    if suite.model.name == "flux-dev":
        write_flux_autoencoder(path)
        return
    assert suite.model.latents
    writers = {"sd": write_autoencoder, "wf": write_wf_vae, "wan": write_wan_autoencoder}
    writers[suite.model.latents.kind](path)


_WRITERS: dict[str, Callable[[Path, Suite], object]] = {
    "denoiser": _write_denoiser,
    "text_encoder": _write_text_encoder,
    "autoencoder": _write_autoencoder,
    "inception": lambda path, _: write_inception(path),
    "alexnet": lambda path, _: write_alexnet(path),
    "clip": lambda path, _: write_clip(path),
    "image_reward": lambda path, _: write_image_reward(path),
    "vocabulary": lambda path, _: write_vocabulary(path),
    "captions": lambda path, _: write_coco_captions(path),
    "training_captions": lambda path, suite: (
        write_mixkit_captions if suite.data.name == "vbench" else write_coco_captions
    )(path),
    "training": lambda path, suite: {"imagenet": write_imagenet, "vbench": write_mixkit}.get(
        suite.data.name, write_coco_images
    )(path),
    "real": lambda path, suite: (write_adm if path.suffix == ".npz" else write_coco_images)(path),
    "prompts": lambda path, suite: (write_vbench if suite.data.name == "vbench" else write_drawbench)(path),
}
