"""The spec of a network that somebody else built, from its diffusers config. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from tcbench.errors import UserError, did_you_mean
from tcbench.models.specs import FREQUENCIES, DiTSpec, FluxSpec, ModelSpec, PixArtSpec, WanSpec

Config = Mapping[str, Any]


def _of_images(name: str, config: Config, **only: Any) -> dict[str, Any]:
    """What the configs of DiT and PixArt-alpha say alike.

    Args:
        only: the values that other fields must have, because adapters and fused kernels take them for granted.
    """
    blocks = {"activation_fn": "gelu-approximate", "attention_bias": True, "upcast_attention": False}
    _only(name, config, **(blocks | {"norm_elementwise_affine": False} | only))
    channels = config["in_channels"]
    return {
        "name": name,
        "num_blocks": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "out_channels": config["out_channels"] or channels,
        "guided_channels": channels,  # diffusers' pipelines guide all of them
        "sample_size": config["sample_size"],
        "norm_eps": config["norm_eps"],
    }


def _dit(name: str, config: Config) -> DiTSpec:
    return DiTSpec(num_classes=config["num_embeds_ada_norm"], **_of_images(name, config))


def _pixart(name: str, config: Config) -> PixArtSpec:
    if config["caption_channels"] is None:
        raise UserError(f"{name}: its config has no caption_channels; tcbench serves those that project captions alone")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    sized = config["use_additional_conditions"]
    return PixArtSpec(
        caption_channels=config["caption_channels"],
        caption_tokens=120,  # what PixArtAlphaPipeline pads its captions to, unless it is told otherwise
        null_caption=False,  # diffusers' conversion drops it
        sized=config["sample_size"] == 128 if sized is None else sized,
        **_of_images(name, config, cross_attention_dim=width, attention_type="default"),
    )


def _only(name: str, config: Config, **values: Any) -> None:
    """Refuse a config that has other values."""
    for field, value in values.items():
        if config[field] != value:
            raise UserError(f"{name}: {field} is {config[field]!r} in its config; tcbench serves {value!r} alone")


def _flux(name: str, config: Config) -> FluxSpec:
    _only(name, config, patch_size=1)
    packed, patch = config["in_channels"], 2  # patches of 2 x 2 latents are its channels
    if packed % patch**2 or config["out_channels"] not in (None, packed):
        raise UserError(
            f"{name}: {packed} channels become {config['out_channels']} in its config; tcbench serves text-to-image, "
            "whose latents keep their channels"
        )
    channels = packed // patch**2
    return FluxSpec(
        name=name,
        num_blocks=config["num_layers"] + config["num_single_layers"],
        double_blocks=config["num_layers"],
        num_heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        patch_size=patch,
        sample_height=128,  # what FluxPipeline makes, unless it is told otherwise
        sample_width=128,
        in_channels=channels,
        out_channels=channels,
        guided_channels=channels,
        caption_channels=config["joint_attention_dim"],
        caption_tokens=512,
        pooled_channels=config["pooled_projection_dim"],
        axes=tuple(config["axes_dims_rope"]),
        reads_guidance=config["guidance_embeds"],
    )


def _wan(name: str, config: Config) -> WanSpec:
    _only(name, config, cross_attn_norm=True, freq_dim=FREQUENCIES, image_dim=None, added_kv_proj_dim=None)
    frames, *patch = config["patch_size"]
    if frames != 1 or len(set(patch)) > 1:
        raise UserError(f"{name}: patch_size is {config['patch_size']} in its config; tcbench serves (1, p, p)")
    return WanSpec(
        name=name,
        num_blocks=config["num_layers"],
        num_heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        patch_size=patch[0],
        sample_frames=21,  # what WanPipeline makes, unless it is told otherwise
        sample_height=60,
        sample_width=104,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        guided_channels=config["in_channels"],
        caption_channels=config["text_dim"],
        caption_tokens=512,
        mlp_width=config["ffn_dim"],
        norm_eps=config["eps"],
    )


TRANSFORMERS: dict[str, Callable[[str, Config], ModelSpec]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
}
"""(name, config) -> the spec, by the name of diffusers' class."""


def spec_of(transformer: Any) -> ModelSpec:
    """The spec of a diffusers transformer, read from its `config`; its weights are not looked at.

    `make_adapter(transformer, spec_of(transformer))` is the network as the engine sees it, with the numerics that it
    has in diffusers. What diffusers' pipelines decide is what they do unless they are told otherwise, and is changed by
    `spec.model_copy`: guidance acts on all channels, captions have 120 tokens (of FLUX.1 and Wan 512), images of FLUX.1
    are 1024 x 1024 pixels, videos of Wan 81 frames of 480 x 832.

    Raises:
        UserError: tcbench knows no adapter for its class, or its config asks for what the adapter does not compute.
    """
    name = type(transformer).__name__
    if name not in TRANSFORMERS:
        raise UserError(f"{name}: no transformer that tcbench has an adapter for; {did_you_mean(name, TRANSFORMERS)}")
    return TRANSFORMERS[name](name, transformer.config)
