"""Toy versions of the files that paper suites name, each in the layout of the official one.

Every writer says which file it imitates; the layouts are those of the publishers' own code, and names of tensors are
written independently of the loaders' tables. `write_files` writes what a config lists, where the config says;
`small_suite` makes the config itself small.
"""

import argparse
import io
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import open_clip
import pytest
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from open_clip.model import convert_weights_to_lp
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPTextConfig,
    CLIPTextModel,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.metrics import image_reward
from tcbench.models.networks import build_transformer
from tcbench.models.specs import MODELS, ModelSpec
from tcbench.models.wf_vae import BLOCKS, WFVAE, WFVAEConfig, build_wf_vae
from tcbench.record.files import write_json
from tcbench.registry import data_source
from tests.references import image_reward as reference
from tests.suites import with_fields

SPECS: dict[str, ModelSpec] = {
    name: MODELS[toy].model_copy(update={"name": name, **changes})
    for name, toy, changes in (
        ("dit-xl-2-256", "tiny-dit", {}),
        ("dit-xl-2-512", "tiny-dit", {}),
        ("pixart-256", "tiny-pixart", {}),
        ("pixart-1024", "tiny-pixart", {"sized": True}),
        ("osp-93x256", "tiny-osp", {"null_caption": False}),
        ("flux-dev", "tiny-flux", {"pooled_channels": 32}),
        ("wan-1.3b", "tiny-wan", {}),
    )
}
"""The paper's models at toy size, under their own names."""

CONFIGS = sorted((Path(__file__).parent.parent / "config").glob("paper-*.yaml"))
NOT_HERE = {"vbench"}
"""What suites of videos name and no writer imitates: VBench's environment."""


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
        "defaults": {}, "ablations": {},
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


# --- denoisers


def random_denoiser(spec: ModelSpec) -> nn.Module:
    """What every checkpoint of a model here holds."""
    return build_transformer(spec, seed=1, zero_init=False)


def write_dit(path: Path, model: nn.Module) -> None:
    """DiT-XL-2-256x256.pt: the averaged weights alone."""
    torch.save(dit_layout(model), path)


def write_dit_training(path: Path, model: nn.Module, plain: nn.Module) -> None:
    """A checkpoint of DiT's train.py: `plain` weights, averaged ones (`model`'s), the optimiser and the flags."""
    optimiser = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    flags = argparse.Namespace(model="DiT-XL/2", data_path="imagenet/train", global_batch_size=256, vae="ema")
    torch.save({"model": dit_layout(plain), "ema": dit_layout(model), "opt": optimiser, "args": flags}, path)


def dit_layout(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that facebookresearch/DiT's class would have."""
    state, emb = dict(model.named_parameters()), "transformer_blocks.0.norm1.emb."
    renamed = _renamed(state, {
        "pos_embed.proj": "x_embedder.proj",
        f"{emb}timestep_embedder.linear_1": "t_embedder.mlp.0",
        f"{emb}timestep_embedder.linear_2": "t_embedder.mlp.2",
        f"{emb}class_embedder.embedding_table": "y_embedder.embedding_table",
        "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear",
    })  # fmt: skip
    for i in range(len(model.transformer_blocks)):
        old, new = f"transformer_blocks.{i}.", f"blocks.{i}."
        renamed |= _stacked(state, f"{new}attn.qkv", [f"{old}attn1.to_{name}" for name in "qkv"])
        renamed |= _renamed(state, {
            f"{old}attn1.to_out.0": f"{new}attn.proj", f"{old}norm1.linear": f"{new}adaLN_modulation.1",
            f"{old}ff.net.0.proj": f"{new}mlp.fc1", f"{old}ff.net.2": f"{new}mlp.fc2",
        })  # fmt: skip
    return renamed | {"pos_embed": torch.zeros(1, 64, 96)}


def write_pixart(path: Path, model: nn.Module) -> None:
    """PixArt-XL-2-256x256.pth and PixArt-XL-2-1024-MS.pth: weights under `state_dict`."""
    torch.save({"state_dict": pixart_layout(model), "epoch": 3}, path)


def pixart_layout(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that PixArt-alpha's class would have, learned null caption included."""
    state, embedders = dict(model.named_parameters()), {"timestep": "t", "resolution": "csize", "aspect_ratio": "ar"}
    renamed = _renamed(state, {
        "pos_embed.proj": "x_embedder.proj", "adaln_single.linear": "t_block.1", "proj_out": "final_layer.linear",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        **{f"adaln_single.emb.{name}_embedder.linear_{number}": f"{short}_embedder.mlp.{number * 2 - 2}"
           for name, short in embedders.items() for number in (1, 2)},
    })  # fmt: skip
    renamed["final_layer.scale_shift_table"] = state["scale_shift_table"]
    renamed["y_embedder.y_embedding"] = state["null_caption"]
    for i in range(len(model.transformer_blocks)):
        old, new = f"transformer_blocks.{i}.", f"blocks.{i}."
        renamed[f"{new}scale_shift_table"] = state[f"{old}scale_shift_table"]
        renamed |= _stacked(state, f"{new}attn.qkv", [f"{old}attn1.to_{name}" for name in "qkv"])
        renamed |= _stacked(state, f"{new}cross_attn.kv_linear", [f"{old}attn2.to_{name}" for name in "kv"])
        renamed |= _renamed(state, {
            f"{old}attn1.to_out.0": f"{new}attn.proj", f"{old}attn2.to_q": f"{new}cross_attn.q_linear",
            f"{old}attn2.to_out.0": f"{new}cross_attn.proj",
            f"{old}ff.net.0.proj": f"{new}mlp.fc1", f"{old}ff.net.2": f"{new}mlp.fc2",
        })  # fmt: skip
    return renamed | {"pos_embed": torch.zeros(1, 64, 96)}


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{new}.{kind}": state[f"{old}.{kind}"].detach()
        for old, new in names.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in state
    }


def _stacked(state: dict[str, Tensor], new: str, parts: list[str]) -> dict[str, Tensor]:
    return {
        f"{new}.{kind}": torch.cat([state[f"{part}.{kind}"].detach() for part in parts]) for kind in ("weight", "bias")
    }


def write_open_sora_plan(folder: Path, model: nn.Module) -> None:
    """Open-Sora-Plan-v1.3.0/any93x640x640: a folder as diffusers saves it, with the class that its own code has."""
    model.save_pretrained(folder, max_shard_size="1MB")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"_class_name": "OpenSoraT2V_v1_3"})


def write_as_diffusers(folder: Path, model: nn.Module) -> None:
    """FLUX.1-dev/transformer and Wan2.1-T2V-1.3B-Diffusers/transformer: shards with their index."""
    model.save_pretrained(folder, max_shard_size="100KB")


def _write_denoiser(path: Path, suite: Suite) -> None:
    spec = SPECS[suite.model.name]
    writers = {"dit": write_dit, "pixart": write_pixart, "open_sora_plan": write_open_sora_plan}
    writers.get(spec.family, write_as_diffusers)(path, random_denoiser(spec))


# --- text encoders


@cache
def sentencepiece_model(bytes_too: bool) -> bytes:
    """A spiece.model: padding 0, end 1, unknown 2, no beginning; mT5's falls back to bytes, T5's does not."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(data_source("partiprompts").prompts()[:300]), model_writer=model, vocab_size=500,
        byte_fallback=bytes_too, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


SIZES: dict[str, Any] = {
    "vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_CONFIG = {"is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **SIZES}


def write_t5(folder: Path) -> nn.Module:
    """PixArt-alpha/t5-v1_1-xxl: the encoder pickled in two shards with their index; no tokenizer.json."""
    extra = [f"<extra_id_{number}>" for number in range(100)]
    more = {"extra_ids": 100, "additional_special_tokens": extra}
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "num_decoder_layers": 2}
    _write_tokenizer(folder, more, {"additional_special_tokens": extra}, config, bytes_too=False)
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**SIZES)).eval()
    state = model.state_dict()
    shards = {f"pytorch_model-0000{number + 1}-of-00002.bin": list(state)[number::2] for number in range(2)}
    for name, keys in shards.items():
        torch.save({key: state[key] for key in keys}, folder / name)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": {key: name for name in shards for key in shards[name]}}
    write_json(folder / "pytorch_model.bin.index.json", index)
    return model


def write_mt5(folder: Path) -> nn.Module:
    """google/mt5-xxl: encoder and decoder in one pickled file; sentencepiece with bytes, no tokenizer.json."""
    more = {"extra_ids": 0, "additional_special_tokens": None, "tokenizer_file": None, "name_or_path": "google/mt5-xxl"}
    config = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "tokenizer_class": "T5Tokenizer"}
    _write_tokenizer(folder, more, {}, config, bytes_too=True)
    torch.manual_seed(0)
    model = MT5ForConditionalGeneration(MT5Config(**SIZES, num_decoder_layers=1)).eval()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model.encoder


def _write_tokenizer(folder: Path, more: Any, special: Any, config: dict[str, Any], bytes_too: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(sentencepiece_model(bytes_too))
    write_json(folder / "tokenizer_config.json", _SPECIAL | more)
    write_json(folder / "special_tokens_map.json", _SPECIAL | special)
    write_json(folder / "config.json", _CONFIG | config)


def write_flux_encoders(folder: Path) -> None:
    """FLUX.1-dev: CLIP's text model and T5 v1.1, each with its tokenizer in a folder beside it."""
    torch.manual_seed(0)
    T5EncoderModel(T5Config(**SIZES)).save_pretrained(folder / "text_encoder_2")
    words = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPTextModel(CLIPTextConfig(**words, vocab_size=260)).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer_2").mkdir()
    (folder / "tokenizer_2" / "spiece.model").write_bytes(sentencepiece_model(False))
    (folder / "tokenizer").mkdir()
    letters = [chr(number) for number in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "tokenizer" / "vocab.json", {piece: number for number, piece in enumerate(pieces)})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    named = special | {"unk_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer" / "tokenizer_config.json", named)


def write_wan_encoder(folder: Path) -> None:
    """Wan2.1-T2V-1.3B-Diffusers: UMT5's encoder, its pieces in a folder beside it."""
    torch.manual_seed(0)
    UMT5EncoderModel(UMT5Config(**SIZES)).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model(True))


def _write_text_encoder(path: Path, suite: Suite) -> None:
    if own := {"flux-dev": write_flux_encoders, "wan-1.3b": write_wan_encoder}.get(suite.model.name):
        own(path)
        return
    (write_mt5 if path.name.startswith("mt5") else write_t5)(path)


# --- autoencoders


def write_autoencoder(folder: Path, pickled: bool = False) -> AutoencoderKL:
    """stabilityai/sd-vae-ft-ema: a config without a scale, attention under its old names.

    `pickled`: as PixArt-alpha's repository has it, in a .bin file alone.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4,
    ).eval()  # fmt: skip
    vae.save_pretrained(folder, safe_serialization=not pickled)
    keys = ("act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
            "norm_num_groups", "out_channels", "sample_size", "up_block_types")  # fmt: skip
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2"}
    write_json(folder / "config.json", config | {key: vae.config[key] for key in keys})
    state = {}
    for key, tensor in vae.state_dict().items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[key] = tensor
    if pickled:
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return vae


WF_VAE: dict[str, Any] = {
    "latent_dim": 4, "base_channels": 8, "encoder_energy_flow_hidden_size": 4, "decoder_energy_flow_hidden_size": 8,
    "connect_res_layer_num": 2, "norm_type": "layernorm", "t_interpolation": "trilinear",
    "scale": (0.18215,) * 4, "shift": (0.0,) * 4,
}  # fmt: skip
"""v1.3.0's variants with few channels, and latents of as many as the small Open-Sora-Plan has."""


def write_wf_vae(folder: Path, **changed: Any) -> WFVAE:
    """Open-Sora-Plan-v1.3.0/vae: a trainer's checkpoint, without the wavelets' filters, and a config."""
    torch.manual_seed(0)
    vae = build_wf_vae(WFVAEConfig.model_validate(WF_VAE | changed))
    folder.mkdir(exist_ok=True)
    named = {"_class_name": "WFVAEModel", "_diffusers_version": "0.30.2", "dropout": 0.0, **BLOCKS}
    write_json(folder / "config.json", named | vae.config.model_dump(mode="json"))
    saved = {"epoch": 3, "state_dict": {"gen_model": vae.state_dict(), "dics_model": {}}, "ema_state_dict": {}}
    torch.save(saved, folder / "merged.ckpt")
    return vae


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


def _write_autoencoder(path: Path, suite: Suite) -> None:
    if suite.model.name == "flux-dev":
        write_flux_autoencoder(path)
        return
    assert suite.model.latents
    writers = {"sd": write_autoencoder, "wf": write_wf_vae, "wan": write_wan_autoencoder}
    writers[suite.model.latents.kind](path)


# --- metrics


def write_inception(path: Path) -> nn.Module:
    """weights-inception-2015-12-05-6726825d.pth of torch-fidelity, at its one size: a state dict of 96 MB."""
    inception = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with (  # random weights: its constructor can only download or load
        patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url"),
        patch.object(inception, "load_state_dict"),
    ):
        network = inception("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return network


def write_adm(path: Path, count: int = 12, pooled: int = 3, spatial: int = 4) -> None:
    """VIRTUAL_imagenet256_labeled.npz of ADM: moments of all images (2048 and 2023 numbers there), and some images."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.savez(
        path, arr_0=images, arr_1=np.arange(count), mu=np.full(pooled, 0.4, np.float32), sigma=np.eye(pooled) * 0.1,
        mu_s=np.full(spatial, 0.6, np.float32), sigma_s=np.eye(spatial) * 0.2,
    )  # fmt: skip


CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
"""Of open_clip, in the place of ViT-L-14-quickgelu."""


@cache
def clip_archive() -> bytes:
    """A traced CLIP in half precision, with its sizes as buffers."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP).eval()
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    model.attn_mask = model._buffers.pop("attn_mask")  # in OpenAI's class a tensor like any, which tracing makes code
    for name, size in sizes.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    convert_weights_to_lp(model)
    inputs = torch.zeros(1, 3, 32, 32, dtype=torch.float16), torch.zeros(1, 77, dtype=torch.int64)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), buffer)
    return buffer.getvalue()


def write_clip(path: Path) -> None:
    """ViT-L-14.pt of OpenAI: a TorchScript archive, code and all."""
    path.write_bytes(clip_archive())


def image_reward_sizes() -> dict[str, Any]:
    """The shapes that `write_image_reward` writes, as `load_image_reward` takes them."""
    small = {"hidden_size": reference.WIDTH, "num_hidden_layers": reference.LAYERS, "num_attention_heads": 2}
    small["intermediate_size"] = 4 * reference.WIDTH
    vision = BlipVisionConfig(**small, image_size=reference.SIDE, patch_size=16, layer_norm_eps=1e-6)
    text = BlipTextConfig(
        **small, vocab_size=40, max_position_embeddings=64, encoder_hidden_size=reference.WIDTH, is_decoder=True
    )
    return {"vision": vision, "text": text}


def write_image_reward(path: Path) -> list[float]:
    """ImageReward.pt of THUDM/ImageReward: the weights that the package's own rewards, returned, were recorded with."""
    recorded = json.loads((reference.HERE / "image_reward.json").read_text(encoding="utf-8"))
    state = {name: torch.from_numpy(reference.fill(name, shape)) for name, shape in recorded["parameters"].items()}
    torch.save(state | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}, path)
    return recorded["rewards"]


def write_vocabulary(folder: Path) -> None:
    """bert-base-uncased: its vocabulary in a text file."""
    shutil.copytree(reference.HERE / "image_reward_vocabulary", folder)
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})


# --- data


def draw_image(path: Path, seed: int) -> None:
    """Blocks of random colours, wider than high."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours.repeat(14, axis=0).repeat(14, axis=1)).save(path)


def write_coco_images(folder: Path, count: int = 8) -> None:
    """train2017 and val2017 of MSCOCO: numbered images side by side."""
    for name in _coco_names(folder.name, count).values():
        draw_image(folder / name, int(Path(name).stem))


def write_coco_captions(path: Path, count: int = 8) -> None:
    """captions_train2017.json and captions_val2017.json of MSCOCO: several captions an image, in any order."""
    names = _coco_names(path.stem.removeprefix("captions_"), count)
    captions = [
        {"image_id": number, "id": 10 * number + again, "caption": f"A dog ({number}), view {again}."}
        for number in names
        for again in (1, 0)
    ]
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    write_json(path, {"images": images[::-1], "annotations": captions})


def _coco_names(part: str, count: int) -> dict[int, str]:
    start = {"train2017": 100, "val2017": 200}[part]
    return {number: f"{number:012}.{'png' if number % 2 else 'jpg'}" for number in range(start, start + count)}


def write_imagenet(folder: Path, classes: int = 10, each: int = 2) -> None:
    """ILSVRC2012's training images: a folder per class."""
    for number in range(classes):
        for index in range(each):
            draw_image(folder / f"n{number:08}" / f"{index}.JPEG", number * each + index)


MIXKIT = [12, 13, 14, 15, 16, 17]
"""Frames of the videos."""


def write_mixkit(folder: Path) -> None:
    """all_mixkit of Open-Sora-Plan-v1.1.0, unpacked: a folder per category."""
    for number, frames in enumerate(MIXKIT):
        write_video(folder / "Cats" / f"{number}.mp4", frames)


def write_mixkit_captions(path: Path) -> None:
    """video_mixkit_513f_1997.json of Open-Sora-Plan-v1.1.0: stretches of videos, each with a caption."""
    write_json(path, [
        {"path": f"Cats/{number}.mp4", "frame_idx": f"0:{frames}", "cap": f"A CAT ({number})."}
        for number, frames in enumerate(MIXKIT)
    ])  # fmt: skip


def grey(number: int) -> int:
    """Of the right half of a frame of `write_video`."""
    return 20 + 4 * number


def write_video(path: Path, frames: int, rate: int = 24, times: Sequence[int] | None = None, side: int = 64) -> None:
    """H.264 in MP4: frame n is of the grey `grey(n)`, its left half black; with `times` in 1 / rate seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 2 * side, side, "yuv444p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number in range(frames):
            picture = np.full((side, 2 * side, 3), grey(number), np.uint8)
            picture[:, :side] = 0
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_vbench(path: Path) -> None:
    """VBench_full_info.json: a prompt, its dimensions, what some of them look for; prompts may come twice."""
    write_json(path, [
        {"prompt_en": "a dog", "dimension": ["subject_consistency"]},
        {"prompt_en": "two cats", "dimension": ["object_class"], "auxiliary_info": {"object_class": {"object": "cat"}}},
        {"prompt_en": "a dog", "dimension": ["overall_consistency", "imaging_quality"]},
    ])  # fmt: skip


def write_drawbench(path: Path) -> None:
    """DrawBench200.txt: a prompt a line."""
    path.write_text("A red colored car.\nA black colored car.\n", encoding="utf-8")


_WRITERS: dict[str, Callable[[Path, Suite], object]] = {
    "denoiser": _write_denoiser,
    "text_encoder": _write_text_encoder,
    "autoencoder": _write_autoencoder,
    "inception": lambda path, _: write_inception(path),
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
