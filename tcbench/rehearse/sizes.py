"""How large stand-ins are: as the official files, or small enough for a CPU, with networks to match."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import open_clip
import torch
from transformers import BlipTextConfig, BlipVisionConfig

from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.metrics import extractors, image_reward
from tcbench.metrics.catalogue import EXTRACTORS
from tcbench.models.networks import save_transformer
from tcbench.models.specs import MODELS, DiTSpec, FluxSpec, ModelSpec, VideoSpec, WanSpec
from tcbench.outside.places import locate
from tcbench.record.files import sha256
from tcbench.rehearse import layouts

SizeName = Literal["full", "tiny"]

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
        ("fashion-dit", "tiny-dit", {"sample_size": 32, "in_channels": 1, "out_channels": 1, "guided_channels": 1}),
        ("cifar10-dit", "tiny-dit", {"sample_size": 32, "in_channels": 3, "out_channels": 3, "guided_channels": 3}),
    )
}
"""Models of the suites that need a GPU at toy size, under their own names."""

NOT_HERE = {"vbench"}
"""What suites of videos name and no writer imitates: VBench's environment."""

WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "the", "of", "left", "right", "small", "large", "red",
    "blue", "cat", "dog", "three", "seven", "two", "##s", "##ing", "on", "under", ",", ".",
)  # fmt: skip
"""A vocabulary for ImageReward, of the embedded network's size or less."""


@dataclass(frozen=True)
class Sizes:
    """Of everything that a suite names.

    Attributes:
        text_encoder: of T5; mT5 has another vocabulary.
        autoencoder, flux_autoencoder, wan_autoencoder, wf_vae: what their configs say.
        clip_text: of FLUX.1's second encoder.
        dtype: that text encoders of FLUX.1 and Wan 2.1 are kept in.
        clip: a config of open_clip.
        vision, text: of ImageReward.
        classes, images, block: of training images: folders of classes, images of a class or in all, pixels of a block.
        reference: images in ADM's batch. moments: numbers of its features, pooled and spatial.
        videos: frames of each.
    """

    text_encoder: dict[str, Any]
    multilingual_words: int
    autoencoder: dict[str, Any]
    flux_autoencoder: dict[str, Any]
    wan_autoencoder: dict[str, Any]
    clip_text: dict[str, Any]
    dtype: torch.dtype
    wf_vae: dict[str, Any]
    clip: dict[str, Any]
    vision: BlipVisionConfig
    text: BlipTextConfig
    classes: int
    images: int
    block: int
    reference: int
    moments: tuple[int, int]
    videos: tuple[int, ...]


_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
}  # fmt: skip
_WF_VAE = {"connect_res_layer_num": 2, "norm_type": "layernorm", "t_interpolation": "trilinear"}  # of v1.3.0

TINY = Sizes(
    text_encoder={
        "vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    multilingual_words=512,
    autoencoder={"block_out_channels": [8, 8], "norm_num_groups": 4},
    flux_autoencoder={"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4},
    wan_autoencoder={
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5],
    },
    clip_text={**_SMALL, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 260},
    dtype=torch.float32,
    wf_vae={
        "latent_dim": 4, "base_channels": 8, "encoder_energy_flow_hidden_size": 4,
        "decoder_energy_flow_hidden_size": 8, "scale": (0.18215,) * 4, "shift": (0.0,) * 4, **_WF_VAE,
    },
    clip={
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    },
    vision=BlipVisionConfig(**_SMALL, image_size=64, patch_size=16, layer_norm_eps=1e-6),
    text=BlipTextConfig(
        **_SMALL, vocab_size=40, max_position_embeddings=64, encoder_hidden_size=32, is_decoder=True
    ),
    classes=10,
    images=2,
    block=14,
    reference=12,
    moments=(2048, 2023),
    videos=(12, 13, 14, 15, 16, 17),
)  # fmt: skip

FULL = Sizes(
    text_encoder={
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    multilingual_words=250112,
    autoencoder={"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32},
    flux_autoencoder={
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "latent_channels": 16,
    },
    wan_autoencoder={},
    clip_text={
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
    dtype=torch.bfloat16,
    wf_vae={"latent_dim": 8, "base_channels": 128, **_WF_VAE},
    clip=open_clip.get_model_config("ViT-L-14-quickgelu") or {},
    vision=image_reward.VISION,
    text=image_reward.TEXT,
    classes=1000,
    images=2,
    block=100,
    reference=256,
    moments=(2048, 2023),
    videos=(140,) * 20,
)  # fmt: skip
"""Networks of their published sizes; data sets of a few hundred images."""

SIZES: dict[SizeName, Sizes] = {"full": FULL, "tiny": TINY}


@contextmanager
def networks(size: SizeName, suite_weights: Path | None = None) -> Iterator[None]:
    """Networks of that size, and weights of Inception that are not the published ones, while this lasts.

    Args:
        suite_weights: of Inception's, if the suite names any.
    """
    with ExitStack() as patches:
        if suite_weights and suite_weights.exists():
            patches.enter_context(patch.object(extractors, "INCEPTION_SHA256", sha256(suite_weights)))
        if size == "tiny":
            patches.enter_context(patch.dict(MODELS, SPECS))
            configs = {"ViT-L-14-quickgelu": TINY.clip}
            patches.enter_context(patch.dict(open_clip.factory._MODEL_CONFIGS, configs))
            small = partial(image_reward.load_image_reward, vision=TINY.vision, text=TINY.text)
            patches.enter_context(patch.object(image_reward, "load_image_reward", small))
        yield


def write_stand_ins(suite: Suite, size: SizeName) -> list[Path]:
    """Write every file that a suite lists and that is not there, at its path; those that were written.

    Raises:
        UserError: the config lists a file that nothing here imitates.
    """
    writers, written = _writers(suite, size), []
    paths = {name: locate(suite.files[name].path.expanduser()) for name in suite.files.keys() - NOT_HERE}
    # a folder before the files in it, which would make it be there without what it holds
    for name, path in sorted(paths.items(), key=lambda item: len(item[1].parts)):
        holds = suite.files[name].holds
        if not path.exists() or (holds and not any((path / held).exists() for held in holds)):
            if name not in writers:
                raise UserError(f"files.{name}: nothing is made up in its place; put a file at {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[name](path)
            written.append(path)
    return written


def _writers(suite: Suite, size: SizeName) -> dict[str, Callable[[Path], object]]:
    sizes, spec = SIZES[size], MODELS[suite.model.name]
    images, videos = sizes.classes * sizes.images, suite.data.name == "vbench"

    def denoiser(path: Path) -> None:
        if isinstance(spec, FluxSpec | WanSpec):
            if size == "tiny":
                layouts.write_as_diffusers(path, layouts.random_denoiser(spec))
            else:
                layouts.write_as_diffusers(path, layouts.random_large_denoiser(spec), "5GB")
            return
        model = layouts.random_denoiser(spec)
        if path.suffix == ".safetensors":
            save_transformer(model, path)
        elif isinstance(spec, VideoSpec):
            layouts.write_open_sora_plan(path, model, "1MB" if size == "tiny" else "5GB")
        else:
            (layouts.write_dit if isinstance(spec, DiTSpec) else layouts.write_pixart)(path, model)

    def classifier(path: Path) -> None:
        layouts.write_classifier(path, EXTRACTORS[str(suite.scoring.extractor)].network().NETWORK)

    def text_encoder(path: Path) -> None:
        if isinstance(spec, FluxSpec):
            layouts.write_flux_encoders(path, sizes.text_encoder, sizes.clip_text, sizes.dtype)
            return
        if isinstance(spec, WanSpec):
            words = 256384 if size == "full" else sizes.multilingual_words
            layouts.write_wan_encoder(path, sizes.text_encoder | {"vocab_size": words}, sizes.dtype)
            return
        multilingual = path.name.startswith("mt5")
        words = sizes.multilingual_words if multilingual else sizes.text_encoder["vocab_size"]
        layouts.write_large_encoder(path, sizes.text_encoder | {"vocab_size": words})

    def autoencoder(path: Path) -> None:
        if suite.model.latents and suite.model.latents.kind == "wf":
            layouts.write_wf_vae(path, sizes.wf_vae)
        elif isinstance(spec, FluxSpec):
            layouts.write_flux_autoencoder(path, sizes.flux_autoencoder)
        elif isinstance(spec, WanSpec):
            layouts.write_wan_autoencoder(path, sizes.wan_autoencoder)
        else:
            layouts.write_autoencoder(path, sizes.autoencoder)

    def reward(path: Path) -> None:
        state = layouts.drawn(layouts.image_reward_shapes(sizes.vision, sizes.text))
        layouts.write_image_reward(path, state, sizes.text.max_position_embeddings)

    def training(path: Path) -> None:
        if videos:
            layouts.write_mixkit(path, sizes.videos)
        elif isinstance(spec, DiTSpec):
            layouts.write_imagenet(path, sizes.classes, sizes.images, sizes.block)
        else:
            layouts.write_coco_images(path, min(images, 200), sizes.block)

    def real(path: Path) -> None:
        if path.suffix == ".npz":
            side = 32 if size == "tiny" else spec.latent_shape[-1] * 8
            layouts.write_adm(path, sizes.reference, *sizes.moments, side=side)
        else:
            layouts.write_coco_images(path, min(images, 200), sizes.block)

    def captions(path: Path) -> None:
        if videos:
            layouts.write_mixkit_captions(path, sizes.videos)
        else:
            layouts.write_coco_captions(path, min(images, 200))

    return {
        "denoiser": denoiser,
        "text_encoder": text_encoder,
        "autoencoder": autoencoder,
        "classifier": classifier,
        "inception": layouts.write_inception,
        "alexnet": layouts.write_alexnet,
        "clip": lambda path: layouts.write_clip(path, sizes.clip),
        "image_reward": reward,
        "vocabulary": lambda path: layouts.write_vocabulary(path, WORDS),
        "captions": captions,
        "training_captions": captions,
        "training": training,
        "real": real,
        "prompts": layouts.write_vbench if videos else layouts.write_drawbench,
    }
