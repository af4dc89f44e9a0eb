"""Files in the layouts in which others publish them, with random content: what the paper suites name.

Every writer says which file it imitates; the layouts are those of the publishers' own code, and names of tensors are
written independently of the loaders' tables. How large they are, `tcbench.rehearse.sizes` says.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import open_clip
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from open_clip.model import convert_weights_to_lp
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torchvision.models import alexnet
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

from tcbench.data.source import PromptSet
from tcbench.models.networks import build_transformer
from tcbench.models.specs import ModelSpec
from tcbench.models.wf_vae import BLOCKS, WFVAE, WFVAEConfig, build_wf_vae
from tcbench.record.files import write_json
from tcbench.registry import data_source

POOL = 4_194_301
"""Random numbers that are repeated to fill large networks; prime, so that no two rows of a matrix begin alike."""


def drawn(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights at memory speed: matrices keep the size of what passes through them, norms do nothing."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1 and "norm" in name.lower() and name.endswith("weight"):
            state[name] = torch.ones(*shape, dtype=dtype)
        else:
            scale = prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.02
            state[name] = pool.repeat(-(-prod(shape) // POOL))[: prod(shape)].view(*shape) * scale
    return state


# --- denoisers


def random_denoiser(spec: ModelSpec) -> nn.Module:
    """What every checkpoint of a model here holds."""
    return build_transformer(spec, seed=1, zero_init=False)


def random_large_denoiser(spec: ModelSpec) -> nn.Module:
    """The same in 16 bits, drawn on a GPU if there is one: FLUX.1 has twelve billion weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return build_transformer(spec, seed=1, zero_init=False, device=device, dtype=torch.bfloat16, drawn_there=True)


def write_as_diffusers(folder: Path, model: Any, shard: str = "100KB") -> None:
    """FLUX.1-dev/transformer and Wan2.1-T2V-1.3B-Diffusers/transformer: shards with their index."""
    model.save_pretrained(folder, max_shard_size=shard)


def write_dit(path: Path, model: nn.Module) -> None:
    """DiT-XL-2-256x256.pt: the averaged weights alone."""
    torch.save(dit_layout(model), path)


def write_dit_training(path: Path, model: nn.Module, plain: nn.Module) -> None:
    """A checkpoint of DiT's train.py: `plain` weights, averaged ones (`model`'s), the optimiser and the flags."""
    optimiser = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    flags = argparse.Namespace(model="DiT-XL/2", data_path="imagenet/train", global_batch_size=256, vae="ema")
    torch.save({"model": dit_layout(plain), "ema": dit_layout(model), "opt": optimiser, "args": flags}, path)


def dit_layout(model: Any) -> dict[str, Tensor]:
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


def pixart_layout(model: Any) -> dict[str, Tensor]:
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


def _renamed(state: Mapping[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{new}.{kind}": state[f"{old}.{kind}"].detach()
        for old, new in names.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in state
    }


def _stacked(state: Mapping[str, Tensor], new: str, parts: list[str]) -> dict[str, Tensor]:
    return {
        f"{new}.{kind}": torch.cat([state[f"{part}.{kind}"].detach() for part in parts]) for kind in ("weight", "bias")
    }


def write_open_sora_plan(folder: Path, model: Any, shard: str = "1MB") -> None:
    """Open-Sora-Plan-v1.3.0/any93x640x640: a folder as diffusers saves it, with the class that its own code has."""
    model.save_pretrained(folder, max_shard_size=shard)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"_class_name": "OpenSoraT2V_v1_3"})


# --- text encoders


@cache
def sentencepiece_model(bytes_too: bool) -> bytes:
    """A spiece.model: padding 0, end 1, unknown 2, no beginning; mT5's falls back to bytes, T5's does not."""
    model, source = io.BytesIO(), cast(PromptSet, data_source("partiprompts"))
    SentencePieceTrainer.train(
        sentence_iterator=iter(source.prompts()[:300]), model_writer=model, vocab_size=500,
        byte_fallback=bytes_too, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_CONFIG = {"is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def write_t5(folder: Path, sizes: Mapping[str, Any]) -> nn.Module:
    """PixArt-alpha/t5-v1_1-xxl: the encoder pickled in two shards with their index; no tokenizer.json."""
    extra = [f"<extra_id_{number}>" for number in range(100)]
    more = {"extra_ids": 100, "additional_special_tokens": extra}
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "num_decoder_layers": 2, **sizes}
    _write_tokenizer(folder, more, {"additional_special_tokens": extra}, config, bytes_too=False)
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**sizes)).eval()
    write_in_shards(folder, model.state_dict())
    return model


def write_in_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    """pytorch_model-0000?-of-00002.bin and their index."""
    shards = {f"pytorch_model-0000{number + 1}-of-00002.bin": list(state)[number::2] for number in range(2)}
    for name, keys in shards.items():
        torch.save({key: state[key] for key in keys}, folder / name)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": {key: name for name in shards for key in shards[name]}}
    write_json(folder / "pytorch_model.bin.index.json", index)


def write_mt5(folder: Path, sizes: Mapping[str, Any]) -> nn.Module:
    """google/mt5-xxl: encoder and decoder in one pickled file; sentencepiece with bytes, no tokenizer.json."""
    _write_mt5_vocabulary(folder, sizes)
    torch.manual_seed(0)
    model = MT5ForConditionalGeneration(MT5Config(**sizes, num_decoder_layers=1)).eval()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model.encoder


def write_large_encoder(folder: Path, sizes: Mapping[str, Any]) -> None:
    """The encoder of t5-v1_1-xxl or mt5-xxl in 16 bits, all that a GPU's loader keeps; none of mT5's decoder."""
    if multilingual := folder.name.startswith("mt5"):
        _write_mt5_vocabulary(folder, sizes)
    else:
        config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "num_decoder_layers": 24, **sizes}
        _write_tokenizer(folder, {"extra_ids": 100}, {}, config, bytes_too=False)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**sizes))
    state = drawn({name: parameter.shape for name, parameter in model.named_parameters()}, torch.bfloat16)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    if multilingual:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        write_in_shards(folder, state)


def _encoder(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A text encoder of drawn weights."""
    with torch.device("meta"):
        model = kind(config)
    state = drawn({name: parameter.shape for name, parameter in model.named_parameters()}, dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def write_flux_encoders(folder: Path, t5: Mapping[str, Any], clip: Mapping[str, Any], dtype: torch.dtype) -> None:
    """FLUX.1-dev: CLIP's text model and T5 v1.1, each with its tokenizer in a folder beside it."""
    _encoder(T5EncoderModel, T5Config(**t5), dtype).save_pretrained(folder / "text_encoder_2")
    _encoder(CLIPTextModel, CLIPTextConfig(**clip), dtype).save_pretrained(folder / "text_encoder")
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


def write_wan_encoder(folder: Path, umt5: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Wan2.1-T2V-1.3B-Diffusers: UMT5's encoder, its pieces in a folder beside it."""
    _encoder(UMT5EncoderModel, UMT5Config(**umt5), dtype).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model(True))


def _write_mt5_vocabulary(folder: Path, sizes: Mapping[str, Any]) -> None:
    more = {"extra_ids": 0, "additional_special_tokens": None, "tokenizer_file": None, "name_or_path": "google/mt5-xxl"}
    config = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "tokenizer_class": "T5Tokenizer"}
    _write_tokenizer(folder, more, {}, config | dict(sizes), bytes_too=True)


def _write_tokenizer(folder: Path, more: Any, special: Any, config: dict[str, Any], bytes_too: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(sentencepiece_model(bytes_too))
    write_json(folder / "tokenizer_config.json", _SPECIAL | more)
    write_json(folder / "special_tokens_map.json", _SPECIAL | special)
    write_json(folder / "config.json", _CONFIG | config)


# --- autoencoders


def write_autoencoder(folder: Path, sizes: Mapping[str, Any], pickled: bool = False) -> AutoencoderKL:
    """stabilityai/sd-vae-ft-ema: a config without a scale, attention under its old names.

    Args:
        sizes: `block_out_channels` and what else its class takes.
        pickled: as PixArt-alpha's repository has it, in a .bin file alone.
    """
    torch.manual_seed(0)
    levels = len(sizes["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae = AutoencoderKL(**blocks, latent_channels=4, **sizes).eval()
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


def write_flux_autoencoder(folder: Path, sizes: Mapping[str, Any]) -> AutoencoderKL:
    """FLUX.1-dev/vae: as Stable Diffusion's, with a shift and without layers around the latent."""
    torch.manual_seed(0)
    levels = len(sizes["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    scale = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    vae = AutoencoderKL(**blocks, **scale, **sizes).eval()
    vae.save_pretrained(folder)
    return vae


def write_wan_autoencoder(folder: Path, sizes: Mapping[str, Any]) -> AutoencoderKLWan:
    """Wan2.1-T2V-1.3B-Diffusers/vae."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**sizes).eval()
    vae.save_pretrained(folder)
    return vae


def write_wf_vae(folder: Path, sizes: Mapping[str, Any]) -> WFVAE:
    """Open-Sora-Plan-v1.3.0/vae: a trainer's checkpoint, without the wavelets' filters, and a config."""
    torch.manual_seed(0)
    vae = build_wf_vae(WFVAEConfig.model_validate(sizes))
    folder.mkdir(exist_ok=True)
    named = {"_class_name": "WFVAEModel", "_diffusers_version": "0.30.2", "dropout": 0.0, **BLOCKS}
    write_json(folder / "config.json", named | vae.config.model_dump(mode="json"))
    saved = {"epoch": 3, "state_dict": {"gen_model": vae.state_dict(), "dics_model": {}}, "ema_state_dict": {}}
    torch.save(saved, folder / "merged.ckpt")
    return vae


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


def write_classifier(path: Path, network: type[nn.Module]) -> None:
    """What `tcbench pretrain SUITE classifier` leaves."""
    torch.manual_seed(1)
    save_file(network().state_dict(), path)


def write_alexnet(path: Path) -> nn.Module:
    """alexnet-owt-7be5be79.pth of torchvision, a state dict; the classifier, which LPIPS does not use, is small."""
    network = alexnet(weights=None)
    network.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    torch.save(network.state_dict(), path)
    return network


def write_adm(path: Path, count: int = 12, pooled: int = 3, spatial: int = 4, side: int = 32) -> None:
    """VIRTUAL_imagenet256_labeled.npz of ADM: moments of all images (2048 and 2023 numbers there), and some images."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    np.savez(
        path, arr_0=images, arr_1=np.arange(count), mu=np.full(pooled, 0.4, np.float32), sigma=np.eye(pooled) * 0.1,
        mu_s=np.full(spatial, 0.6, np.float32), sigma_s=np.eye(spatial) * 0.2,
    )  # fmt: skip


def clip_archive(config: Mapping[str, Any]) -> bytes:
    """A traced CLIP in half precision, with its sizes as buffers."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    side, words = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
    sizes = {"input_resolution": side, "context_length": words, "vocab_size": config["text_cfg"]["vocab_size"]}
    model.attn_mask = model._buffers.pop("attn_mask")  # in OpenAI's class a tensor like any, which tracing makes code
    for name, size in sizes.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    convert_weights_to_lp(model)
    inputs = torch.zeros(1, 3, side, side, dtype=torch.float16), torch.zeros(1, words, dtype=torch.int64)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), buffer)
    return buffer.getvalue()


def write_clip(path: Path, config: Mapping[str, Any]) -> None:
    """ViT-L-14.pt of OpenAI: a TorchScript archive, code and all."""
    path.write_bytes(clip_archive(config))


def image_reward_shapes(vision: BlipVisionConfig, text: BlipTextConfig) -> dict[str, list[int]]:
    """The tensors of ImageReward.pt, by their official names."""
    wide, width, inner = vision.hidden_size, text.hidden_size, text.intermediate_size
    side, patch_side = cast(int, vision.image_size), cast(int, vision.patch_size)
    patches = (side // patch_side) ** 2
    shapes: dict[str, list[int]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [out, into], [out]

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [channels], [channels]

    shapes["blip.visual_encoder.cls_token"] = [1, 1, wide]
    shapes["blip.visual_encoder.pos_embed"] = [1, 1 + patches, wide]
    shapes["blip.visual_encoder.patch_embed.proj.weight"] = [wide, 3, patch_side, patch_side]
    shapes["blip.visual_encoder.patch_embed.proj.bias"] = [wide]
    for number in range(vision.num_hidden_layers):
        block = f"blip.visual_encoder.blocks.{number}"
        norm(f"{block}.norm1", wide)
        linear(f"{block}.attn.qkv", 3 * wide, wide)
        linear(f"{block}.attn.proj", wide, wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.mlp.fc1", vision.intermediate_size, wide)
        linear(f"{block}.mlp.fc2", wide, vision.intermediate_size)
    norm("blip.visual_encoder.norm", wide)
    embeddings = "blip.text_encoder.embeddings"
    shapes[f"{embeddings}.word_embeddings.weight"] = [text.vocab_size, width]
    shapes[f"{embeddings}.position_embeddings.weight"] = [text.max_position_embeddings, width]
    norm(f"{embeddings}.LayerNorm", width)
    for number in range(text.num_hidden_layers):
        layer = f"blip.text_encoder.encoder.layer.{number}"
        for part, seen in (("attention", width), ("crossattention", wide)):
            linear(f"{layer}.{part}.self.query", width, width)
            linear(f"{layer}.{part}.self.key", width, seen)
            linear(f"{layer}.{part}.self.value", width, seen)
            linear(f"{layer}.{part}.output.dense", width, width)
            norm(f"{layer}.{part}.output.LayerNorm", width)
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        norm(f"{layer}.output.LayerNorm", width)
    linear("blip.vision_proj", 256, wide)
    linear("blip.text_proj", 256, width)
    for place, (into, out) in zip((0, 2, 4, 6, 7), pairwise((width, 1024, 128, 64, 16, 1)), strict=True):
        linear(f"mlp.layers.{place}", out, into)  # dropouts are counted
    return shapes


def write_image_reward(path: Path, state: Mapping[str, Tensor], positions: int) -> None:
    """ImageReward.pt of THUDM/ImageReward: weights under their official names, and a buffer of positions."""
    torch.save({**state, "blip.text_encoder.embeddings.position_ids": torch.arange(positions)[None]}, path)


def write_vocabulary(folder: Path, words: Sequence[str]) -> None:
    """bert-base-uncased: its vocabulary in a text file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})


# --- data


def draw_image(path: Path, seed: int, block: int = 14) -> None:
    """Blocks of random colours, so many pixels on a side, wider than high."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours.repeat(block, axis=0).repeat(block, axis=1)).save(path)


def write_coco_images(folder: Path, count: int = 8, block: int = 14) -> None:
    """train2017 and val2017 of MSCOCO: numbered images side by side."""
    for name in _coco_names(folder.name, count).values():
        draw_image(folder / name, int(Path(name).stem), block)


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


def write_imagenet(folder: Path, classes: int = 10, each: int = 2, block: int = 14) -> None:
    """ILSVRC2012's training images: a folder per class."""
    for number in range(classes):
        for index in range(each):
            draw_image(folder / f"n{number:08}" / f"{index}.JPEG", number * each + index, block)


MIXKIT = [12, 13, 14, 15, 16, 17]
"""Frames of the videos."""


def write_mixkit(folder: Path, lengths: Sequence[int] = MIXKIT) -> None:
    """all_mixkit of Open-Sora-Plan-v1.1.0, unpacked: a folder per category."""
    for number, frames in enumerate(lengths):
        write_video(folder / "Cats" / f"{number}.mp4", frames)


def write_mixkit_captions(path: Path, lengths: Sequence[int] = MIXKIT) -> None:
    """video_mixkit_513f_1997.json of Open-Sora-Plan-v1.1.0: stretches of videos, each with a caption."""
    write_json(path, [
        {"path": f"Cats/{number}.mp4", "frame_idx": f"0:{frames}", "cap": f"A CAT ({number})."}
        for number, frames in enumerate(lengths)
    ])  # fmt: skip


def grey(number: int) -> int:
    """Of the right half of a frame of `write_video`; again from the start after 59 frames."""
    return 20 + 4 * (number % 59)


def write_video(path: Path, frames: int, rate: int = 24, times: Sequence[int] | None = None, side: int = 64) -> None:
    """H.264 in MP4: frame n is of the grey `grey(n)`, its left half black; with `times` in 1 / rate seconds."""
    import av  # slow to import, and most suites do without

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
