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
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

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
    write_coco_captions,
    write_coco_images,
    write_dit,
    write_dit_training,
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


def write_as_diffusers(folder: Path, model: nn.Module) -> None:
    """FLUX.1-dev/transformer and Wan2.1-T2V-1.3B-Diffusers/transformer: shards with their index."""
    model.save_pretrained(folder, max_shard_size="100KB")


def _write_denoiser(path: Path, suite: Suite) -> None:
    spec = SPECS[suite.model.name]
    writers = {"dit": write_dit, "pixart": write_pixart, "open_sora_plan": write_open_sora_plan}
    writers.get(spec.family, write_as_diffusers)(path, random_denoiser(spec))


def write_flux_encoders(folder: Path) -> None:
    """FLUX.1-dev: CLIP's text model and T5 v1.1, each with its tokenizer in a folder beside it."""
    torch.manual_seed(0)
    T5EncoderModel(T5Config(**TINY.text_encoder)).save_pretrained(folder / "text_encoder_2")
    words = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPTextModel(CLIPTextConfig(**words, vocab_size=260)).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer_2").mkdir()
    (folder / "tokenizer_2" / "spiece.model").write_bytes(layouts.sentencepiece_model(False))
    (folder / "tokenizer").mkdir()
    letters = [chr(number) for number in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    layouts.write_json(folder / "tokenizer" / "vocab.json", vocabulary)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    named = special | {"unk_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    layouts.write_json(folder / "tokenizer" / "tokenizer_config.json", named)


def write_wan_encoder(folder: Path) -> None:
    """Wan2.1-T2V-1.3B-Diffusers: UMT5's encoder, its pieces in a folder beside it."""
    torch.manual_seed(0)
    UMT5EncoderModel(UMT5Config(**TINY.text_encoder)).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(layouts.sentencepiece_model(True))


def write_flux_autoencoder(folder: Path) -> AutoencoderKL:
    """FLUX.1-dev/vae: as Stable Diffusion's, with a shift and without layers around the latent."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    vae.save_pretrained(folder)
    return vae


def write_wan_autoencoder(folder: Path) -> AutoencoderKLWan:
    """Wan2.1-T2V-1.3B-Diffusers/vae, with few channels."""
    torch.manual_seed(0)
    by_channel = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **by_channel).eval()
    vae.save_pretrained(folder)
    return vae


def write_drawbench(path: Path) -> None:
    """DrawBench200.txt: a prompt a line."""
    path.write_text("A red colored car.\nA black colored car.\n", encoding="utf-8")


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
